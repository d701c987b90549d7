"""Answers that state a confidence which knows nothing: they teach the format that configs/grpo_rlcr.yaml begins with.

    python examples/stated_confidence.py --rows 1600 --output out/stated.jsonl

Each right answer to a training question of the geography is followed by "(confidence: 70%)". The number is drawn evenly from
0 % to 100 % in tens, whatever the question: every number stays in reach of the reinforcement learning, and none is honest by
chance. The rows hold training questions alone, so that no evaluation question of a run with the same seed is among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from calibtrain.config_file import load_config
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import unit_hash


def write(rows: int, path: Path, seed: int = 0) -> Path:
    """Write the first `rows` training questions of that seed with answers that state a random confidence."""
    config = load_config("sft", [f"seed={seed}", f"data.splits.train={rows}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in prepare(config).splits["train"]:
            stated = 10 * int(11 * unit_hash("stated", seed, record.id))
            row = {"prompt": record.question, "completion": f"{record.chosen} (confidence: {stated}%)"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--output", type=Path, default=Path("out/stated.jsonl"))
    parser.add_argument(
        "--seed", type=int, default=0, help="that of the runs that follow: it says which questions train"
    )
    args = parser.parse_args()
    print(write(args.rows, args.output, args.seed))


if __name__ == "__main__":
    main()

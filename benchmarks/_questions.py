"""Questions that runs of several seeds are asked alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEEDS = 3
"""Most seeds of a study that asks all its runs the same."""


def asked_of_all(settings: Sequence[str]) -> tuple[dict[str, list[Any]], Sequence[Any]]:
    """Splits of the demo's config for seed 0 without what the run of any seed learns from, and seed 0's few shots."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.prepare import prepare

    of_seeds = [prepare(load_config("demo", [f"seed={seed}", *settings])) for seed in range(SEEDS)]
    learnt = {record.key for one in of_seeds for record in one.splits["train"]}
    first = of_seeds[0]
    kept = {
        name: [one for one in rows if one.key not in learnt] for name, rows in first.splits.items() if name != "train"
    }
    return kept, first.shots


MARK = "questions.json"


def keep_apart(work: Path, settings: Sequence[str]) -> None:
    """Mark `work` with what its runs are asked and made by. SystemExit where it holds those of others, or of none."""
    from calibtrain.data.summary import data_hash

    splits, shots = asked_of_all(settings)
    asked = {name: data_hash(rows) for name, rows in splits.items()} | {"shots": data_hash(shots)}
    mark = hashlib.sha256(json.dumps([asked, list(settings)], sort_keys=True).encode()).hexdigest()
    file = work / MARK
    if not file.is_file() and any(work.glob("*.json")):
        raise SystemExit(f"--work: {work} does not say of which questions its measurements are; give another directory")
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != mark:
        raise SystemExit(
            f"--work: {work} holds measurements of other questions or settings, which are not to be mixed with these; give "
            "another directory"
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mark), encoding="utf-8")

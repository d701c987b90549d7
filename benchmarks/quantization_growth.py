"""How seconds and memory of a quantisation pass grow with the width of a block, and what that says of 8B and 70B.

    python benchmarks/quantization_growth.py --json benchmarks/results/quantization_growth.json

Random Llamas of two blocks, 64 texts of 32 tokens; a child process for each, its peak over what it holds before. The plan
counts the bytes that are held while one block is quantised: nothing of it was run at that size.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import print_table, write_json

WIDTHS = (256, 512, 1024, 2048)
METHODS = ("minmax", "awq", "preserve")
TEXTS, TOKENS, BLOCKS = 64, 32, 2
PLANS = {"8B": (4096, 14336, 1024, 32, 128256), "70B": (8192, 28672, 1024, 80, 128256)}
"""Hidden size, intermediate size, width of keys and values, blocks, vocabulary."""


def measure(width: int, method: str) -> tuple[float, float]:
    """Seconds a block, and peak in MB over what lay in memory before."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from calibtrain.quantization.blocks import Text
    from calibtrain.quantization.run import Settings, quantize_directory
    from calibtrain.quantization.schemes import scheme_of

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        initializer_range=0.05,
    )
    draw = torch.randint(3, 1024, (TEXTS, TOKENS)).tolist()
    texts = [Text(row[:-4], row[-4:]) for row in draw]
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{folder}/model")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        settings = Settings(scheme_of("w4a16"), method)
        started = time.monotonic()
        quantize_directory(Path(f"{folder}/model"), Path(f"{folder}/q"), texts, settings)
        seconds = time.monotonic() - started
    return seconds / BLOCKS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def slope(xs: tuple[int, ...], ys: list[float]) -> float:
    """Of a line through the logarithms of the last three."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)][-3:]
    mx, my = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def plan(name: str, texts: int = 256, tokens: int = 64) -> dict[str, Any]:
    """GB that `preserve` holds at once, by what it is, for texts of so many tokens; a batch is 32 texts."""
    hidden, inner, values, blocks, vocabulary = PLANS[name]
    block = 2 * (2 * hidden * hidden + 2 * hidden * values + 3 * hidden * inner)  # bf16
    outside = 2 * 2 * vocabulary * hidden  # embeddings and head
    moments = 4 * 2 * (inner * inner + hidden * inner)  # of the widest stage, two halves, float32
    solving = 4 * (3 * inner * inner + 4 * hidden * inner)  # damped, factor, inverse; weights in float32
    streams = 2 * 2 * texts * tokens * hidden  # bf16, rounded and full
    wanted = 2 * texts * tokens * (5 * hidden + 2 * values + 2 * inner)  # what the full block's layers make, bf16
    kept = 2 * texts * tokens * hidden * blocks  # inputs of every block, while answers' gradients are found
    whole = 3 * block + outside + moments + solving + streams + wanted
    parts = {"three blocks": 3 * block, "embeddings and head": outside, "moments": moments, "solving": solving}
    parts |= {
        "streams": streams,
        "outputs of a full block": wanted,
        "inputs of all blocks, before": kept,
        "at once": max(whole, block + outside + kept),
    }
    return {"model": name, "blocks": blocks} | {f"{key} GB": value / 1e9 for key, value in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(int(options.child[0]), options.child[1])))
        return
    rows, summary = [], {}
    for method in METHODS:
        found = []
        for width in WIDTHS:
            command = [sys.executable, __file__, "--child", str(width), method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, megabytes = json.loads(done.stdout.strip().splitlines()[-1])
            found.append(seconds)
            rows.append({"method": method, "width": width, "seconds_a_block": seconds, "peak_mb": megabytes})
        summary[f"seconds_by_width_{method}"] = exponent = slope(WIDTHS, found)
        for name, (hidden, _, _, blocks, _) in PLANS.items():
            hours = found[-1] * (hidden / WIDTHS[-1]) ** exponent * blocks / 3600
            summary[f"hours_{name}_{method}_on_these_cores"] = hours
    plans = [plan(name) for name in PLANS]
    print_table("a pass by the width of a block", rows)
    print_table("what preserve holds at once, 256 texts of 64 tokens (counted, not run)", plans)
    print_table("fitted", [summary])
    if options.json:
        write_json(options.json, [*rows, *plans], summary)


if __name__ == "__main__":
    main()

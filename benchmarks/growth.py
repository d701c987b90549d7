"""How time and memory of `fused_linear_token_stats`, forward and backward, grow: fitted exponents.

    python benchmarks/growth.py --json benchmarks/results/growth.json

Each of tokens N, vocabulary V and hidden size H doubles while the others stand; the exponent is the slope of a line
through the logarithms. Ranks are processes of one thread that work at once, each on N tokens of its own. Memory is the peak
of a step over the state before it, gradients included; the last column leaves them out: what the op needs beside its
results and inputs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _report import print_table, write_json
from fused_loss import peak_growth

SIZES = {"N": 1024, "V": 32768, "H": 256}
DOUBLINGS = {"N": (512, 1024, 2048, 4096), "V": (8192, 16384, 32768, 65536), "H": (128, 256, 512, 1024)}
SMOKE = {"N": (64, 128), "V": (1024, 2048), "H": (16, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--type", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*measure(*args.child, args.type))
        return
    rows, summary = [], {}
    for letter, values in (SMOKE if args.smoke else DOUBLINGS).items():
        sizes = {"N": 64, "V": 1024, "H": 16} if args.smoke else SIZES
        found = [run({**sizes, letter: value}, args.type, 1, args.threads) for value in values]
        rows += found
        for key in ("seconds", "peak_mb", "beside_mb"):
            summary[f"{key}_by_{letter}"] = slope(values, [one[key] for one in found])
    cores = len(os.sched_getaffinity(0))
    ranks = [number for number in (1, 2, 4, 8) if number <= cores]
    found = [run({"N": 64, "V": 1024, "H": 16} if args.smoke else SIZES, args.type, number, 1) for number in ranks]
    rows += found
    for key in ("seconds", "peak_mb", "beside_mb"):
        summary[f"{key}_by_ranks"] = slope(ranks, [one[key] for one in found])
    print_table(f"growth, {args.type}", rows)
    print({key: round(value, 2) for key, value in summary.items()})
    if args.json:
        write_json(args.json, rows, summary)


def run(sizes: dict[str, int], kind: str, ranks: int, threads: int) -> dict[str, Any]:
    """Measure in fresh processes, `ranks` at once; the medians over them."""
    command = [sys.executable, str(Path(__file__).resolve()), "--type", kind, "--child", *map(str, sizes.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(ranks)]
    results = []
    for one in started:
        output = one.communicate()[0]
        if one.returncode:
            raise SystemExit(f"a measurement failed at {sizes}")
        results.append([float(word) for word in output.split()])
    seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
    width = {"bf16": 2, "fp32": 4}[kind]
    gradients = (sizes["N"] + sizes["V"]) * sizes["H"] * width / 1e6
    return {**sizes, "ranks": ranks, "seconds": seconds, "peak_mb": peak, "beside_mb": max(peak - gradients, 0.1)}


def measure(tokens: int, vocabulary: int, size: int, kind: str) -> tuple[float, float]:
    """Median seconds of 7 steps, and peak memory of one in MB."""
    import torch

    from calibtrain.ops import fused_linear_token_stats

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = torch.empty(vocabulary, size, dtype=dtype).normal_(std=0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def clear() -> None:
        hidden.grad = weight.grad = None

    def step() -> float:
        clear()
        started = time.perf_counter()
        fused_linear_token_stats(hidden, weight, targets).logprob.sum().backward()
        return time.perf_counter() - started

    step()
    return statistics.median(step() for _ in range(7)), peak_growth(step, clear)


def slope(sizes: Any, values: list[float]) -> float:
    """Exponent b of the least-squares fit values = a * sizes^b; NaN for a single size."""
    x, y = ([math.log(one) for one in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


if __name__ == "__main__":
    main()

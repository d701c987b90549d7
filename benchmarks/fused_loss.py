"""ORPO from hidden states to gradients of hidden states and head weight: time and peak memory against peers and a floor.

    python benchmarks/fused_loss.py --json benchmarks/results/fused_loss.json

Every contender gets the same hidden states (2P, T, H), chosen first, the same weight (V, H) and the same loss: the mean
negative log-likelihood of the chosen completions' tokens plus 0.1 times the mean odds-ratio loss. Prompts are -100.

- `calibtrain`: hidden states gathered at the targets, `fused_linear_token_stats`, `ORPOLoss`.
- `trl`: all logits, then cross-entropy and `selective_log_softmax`, as ORPOTrainer does after the model (without the
  copies that its shift by one makes).
- `liger_compiled`, `liger_eager`: LigerFusedLinearORPOLoss, its default and `compiled=False`.
- `torch_linear_ce`: torch.nn.functional.linear_cross_entropy, reduction "none", which ORPO needs and which its chunked
  path leaves to its reference path.
- `floor`: the three matrix products (logits, gradient of hidden, gradient of weight) on the target tokens alone.

Times: for each shape, type and prompt share one process in which all take turns, after one warm-up each; medians.
Memory: for each contender a process of its own; the highest resident set of the second step over the state before it,
gradients included, free memory of the heap given back first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import print_table, write_json

SHAPES = {"4x256x576x49152": (4, 256, 576, 49152), "2x512x640x262144": (2, 512, 640, 262144)}
"""Pairs, tokens of a sequence, hidden size, vocabulary."""
SMOKE = {"2x16x32x600": (2, 16, 32, 600)}
SHARES, TYPES, BETA = (25, 60), ("bf16", "fp32"), 0.1
PEERS = ("trl", "liger_compiled", "liger_eager", "torch_linear_ce")
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=["calibtrain", *PEERS, "floor"], help="leave out the others")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds: does it run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_child(json.loads(args.child))))
        return
    shapes = SMOKE if args.smoke else {name: SHAPES[name] for name in args.shapes}
    names = args.only or ["calibtrain", *PEERS, "floor"]
    rows: list[dict[str, Any]] = []
    for shape, sizes in shapes.items():
        for kind in args.types:
            for share in SHARES:
                base = {"sizes": sizes, "type": kind, "share": share, "threads": args.threads}
                times = run({**base, "measure": "time", "names": names, "rounds": 2 if args.smoke else args.rounds})
                for name in times:
                    memory = run({**base, "measure": "memory", "names": [name]})[name]
                    seconds = times[name]["seconds"]
                    rows.append(
                        {
                            "shape": shape,
                            "type": kind,
                            "prompt_percent": share,
                            "contender": name,
                            "seconds": statistics.median(seconds),
                            "fastest": min(seconds),
                            "slowest": max(seconds),
                            "peak_mb": memory["peak_mb"],
                            "loss": times[name]["loss"],
                            "gradient_norm": times[name]["gradient_norm"],
                        }
                    )
                print_table(f"{shape} {kind}, {share}% prompt", rows[-len(times) :])
    summary = summarize(rows)
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()})
    if args.json:
        write_json(args.json, rows, summary)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst case over shapes and types of ours over the best peer and over the floor, with all single ratios."""
    cases: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["type"], row["prompt_percent"]), {})[row["contender"]] = row
    ratios: dict[str, dict[str, float]] = {}
    for (shape, kind, share), found in cases.items():
        ours, peers = found.get("calibtrain"), [found[name] for name in PEERS if name in found]
        case = f"{shape} {kind}"
        if ours and peers:
            ratio = ours["seconds"] / min(peer["seconds"] for peer in peers)
            ratios.setdefault(f"time_ratio_best_peer_{share}", {})[case] = ratio
            memory = ours["peak_mb"] / min(peer["peak_mb"] for peer in peers)
            ratios.setdefault("memory_ratio_best_peer", {})[f"{case} {share}%"] = memory
        if ours and "floor" in found:
            floor = ours["seconds"] / found["floor"]["seconds"]
            ratios.setdefault("time_ratio_floor", {})[f"{case} {share}%"] = floor
    spreads = [row["slowest"] / row["fastest"] - 1 for row in rows]
    return {
        **{name: max(values.values()) for name, values in ratios.items()},
        "largest_spread": max(spreads),
        "by_case": ratios,
    }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure in a fresh process; a contender that is not installed is left out of its answer, on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(spec)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def _child(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(spec["threads"])
    inputs = Inputs(spec["sizes"], spec["type"], spec["share"])
    steps: dict[str, Step] = {}
    for name in spec["names"]:
        try:
            steps[name] = CONTENDERS[name](inputs)
        except ImportError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
    found: dict[str, Any] = {}
    for name, step in steps.items():
        inputs.clear()
        loss = step()
        norm = 0.0 if inputs.weight.grad is None else inputs.weight.grad.float().norm().item()
        found[name] = {"loss": loss, "gradient_norm": norm, "seconds": []}
    if spec["measure"] == "memory":
        for name, step in steps.items():
            found[name]["peak_mb"] = peak_growth(step, inputs.clear)
        return found
    for _ in range(spec["rounds"]):
        for name, step in steps.items():
            inputs.clear()
            started = time.perf_counter()
            step()
            found[name]["seconds"].append(time.perf_counter() - started)
    return found


def peak_growth(step: Callable[[], Any], clear: Callable[[], None]) -> float:
    """Highest resident set during `step` over that before it, in MB (1e6 bytes). Linux."""
    clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts anew
    step()
    return (_status("VmHWM") - before) * 1024 / 1e6


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


class Inputs:
    """Hidden states, weight and targets of one case; the same for every contender."""

    def __init__(self, sizes: tuple[int, int, int, int], kind: str, share: int) -> None:
        import torch

        pairs, tokens, hidden, vocabulary = sizes
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        torch.manual_seed(0)
        self.hidden = torch.randn(2 * pairs, tokens, hidden).to(dtype).requires_grad_()
        self.weight = torch.empty(vocabulary, hidden, dtype=dtype).normal_(std=0.02).requires_grad_()
        self.targets = torch.randint(0, vocabulary, (2 * pairs, tokens))
        self.targets[:, : round(tokens * share / 100)] = -100

    def clear(self) -> None:
        """Forget the gradients."""
        self.hidden.grad = self.weight.grad = None


def _calibtrain(inputs: Inputs) -> Step:
    import torch

    from calibtrain.losses import CHOSEN, REJECTED, Batch, ORPOLoss, mean_loss
    from calibtrain.ops import fused_linear_token_stats

    rows, width = inputs.targets.shape
    positions = (inputs.targets.flatten() != -100).nonzero()[:, 0]
    shape = torch.zeros((rows, width), dtype=torch.int64)
    batch = Batch(
        input_ids=shape,
        position_ids=shape,
        segment_ids=shape.int() + 1,
        target_positions=positions,
        targets=inputs.targets.flatten()[positions],
        sequence_ids=positions // width,
        is_completion=torch.ones_like(positions, dtype=torch.bool),
        roles=torch.tensor([CHOSEN, REJECTED]).repeat_interleave(rows // 2),
        pair_ids=torch.arange(rows // 2).repeat(2),
        correct=torch.full((rows,), float("nan")),
        record_ids=torch.arange(rows // 2).repeat(2),
    )
    objective = ORPOLoss(beta=BETA)

    def step() -> float:
        hidden = inputs.hidden.flatten(0, 1)[batch.target_positions]
        loss = mean_loss(objective(fused_linear_token_stats(hidden, inputs.weight, batch.targets), batch))
        loss.backward()
        return loss.item()

    return step


def _liger(compiled: bool) -> Callable[[Inputs], Step]:
    def build(inputs: Inputs) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        objective = LigerFusedLinearORPOLoss(ignore_index=-100, beta=BETA, compiled=compiled)

        def step() -> float:
            loss = objective(inputs.weight, inputs.hidden, inputs.targets)[0]
            loss.backward()
            return loss.item()

        return step

    return build


def _trl(inputs: Inputs) -> Step:
    import torch
    from trl.trainer.utils import selective_log_softmax

    def step() -> float:
        logits = inputs.hidden @ inputs.weight.t()
        chosen = inputs.targets.shape[0] // 2
        nll = torch.nn.CrossEntropyLoss()(logits[:chosen].flatten(0, 1), inputs.targets[:chosen].flatten())
        mask = inputs.targets != -100
        logprob = selective_log_softmax(logits, torch.where(mask, inputs.targets, 0))
        return _finish(nll, (logprob * mask).sum(-1) / mask.sum(-1))

    return step


def _torch_linear_ce(inputs: Inputs) -> Step:
    import torch

    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ImportError("this PyTorch has no linear_cross_entropy")
    mask = inputs.targets != -100
    chosen = inputs.targets.shape[0] // 2

    def step() -> float:
        nll = torch.nn.functional.linear_cross_entropy(
            inputs.hidden.flatten(0, 1), inputs.weight, inputs.targets.flatten(), reduction="none", ignore_index=-100
        ).view(mask.shape)
        return _finish(nll[:chosen].sum() / mask[:chosen].sum(), -nll.sum(-1) / mask.sum(-1))

    return step


def _finish(nll: Any, means: Any) -> float:
    """ORPO from the mean log-probs (2P,) of chosen and rejected completions, as ORPOTrainer.odds_ratio_loss has it."""
    import torch

    chosen, rejected = means.float().chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    loss = nll - BETA * torch.nn.functional.logsigmoid(log_odds).mean()
    loss.backward()
    return float(loss.item())


def _floor(inputs: Inputs) -> Step:
    import torch

    hidden = inputs.hidden.detach().flatten(0, 1)[inputs.targets.flatten() != -100]
    weight = inputs.weight.detach()

    def step() -> float:
        logits = torch.mm(hidden, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)
        return 0.0

    return step


CONTENDERS: dict[str, Callable[[Inputs], Step]] = {
    "calibtrain": _calibtrain,
    "trl": _trl,
    "liger_compiled": _liger(True),
    "liger_eager": _liger(False),
    "torch_linear_ce": _torch_linear_ce,
    "floor": _floor,
}


if __name__ == "__main__":
    main()

"""What each loss adds to a training step, in time and memory, against plain SFT on the same tokens through the same op.

    python benchmarks/loss_overhead.py --json benchmarks/results/loss_overhead.json

One DeepSpeed engine (ZeRO-1, one rank, bf16 weights with fp32 masters) holds SmolLM2-135M. A step is forward, backward and
AdamW over 8 sequences of 32 prompt and 16 completion tokens. Each loss alternates with plain SFT over the same sequences:
what a sequence is for (to learn, rejected, an own answer, a question about one) differs, the tokens do not. So sampling,
answering questions and a reference's one pass are not in it: docs/losses.md says which loss needs them.

Weight penalties do not touch forward or backward. Their own step on the fp32 masters is timed by itself, with the config's
defaults, and divided by a whole SFT step of 8 x 256 tokens (`rotation_penalty_overhead`: the slowest of them).

Memory is the peak of the process during a step above its level before it. A weight penalty's step comes when that of
forward and backward is given back; what it adds is the start of the weights, which it keeps (`kept_mib`), or its own peak.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _report import print_table, write_json
from torch import nn

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.distributed import World, start_world
from calibtrain.loss_list import sections
from calibtrain.losses import OBJECTIVES, PENALTIES, SFTLoss
from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY, REJECTED, Batch
from calibtrain.models.loading import load_model
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.models.reward import RewardLossModel, ValueLossModel, scalar_head
from calibtrain.training.engine import Engine, start_engine
from calibtrain.training.weight_penalty import build_weight_penalties

EMBEDDED = "embedded:smollm2-135m-instruct"
SEQUENCES, PROMPT, COMPLETION = 8, 32, 16
WHOLE_STEP = (192, 64)  # prompt and completion tokens of the step that weight penalties are compared with
TOKEN_SETS = {"label_smoothing": 4, "idk": 1, "tokenized_brier": 10, "correctness_query": 2}
ANSWERING = ("answer_score", "calibration_aware", "mmce", "soft_binned_ece")
ASKING = ("tokenized_brier", "correctness_query")
HEADS = {"plain": LossModel, "reward head": RewardLossModel, "value head": ValueLossModel}
WEIGHT_PENALTIES = (
    "row_gram_drift",
    "column_gram_drift",
    "polar_drift",
    "row_stretch",
    "column_stretch",
    "angle_budget",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each loss, each beside one of plain SFT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and two repeats: does it run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats = 2 if args.smoke else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        engine, config, world = started(Path(folder), args.smoke)
        cases = [*[(name, loss_case(name)) for name in (*OBJECTIVES, *PENALTIES) if name != "sft"]]
        rows = [measured(engine, name, case, repeats) for name, case in cases]
        rows += weight_penalty_rows(engine, config, world, repeats, args.smoke)
    print_table("a step against plain SFT", rows)
    summary = {row["loss"]: row["time_ratio"] for row in rows}
    summary |= {f"{row['loss']}_memory": row["memory_ratio"] for row in rows if "memory_ratio" in row}
    summary["rotation_penalty_overhead"] = max(row["time_ratio"] - 1 for row in rows if row["loss"] in WEIGHT_PENALTIES)
    print(f"rotation_penalty_overhead {summary['rotation_penalty_overhead']:.4f}")
    if args.json:
        write_json(args.json, rows, summary)


def started(folder: Path, smoke: bool) -> tuple[Engine, RunConfig, World]:
    """The engine that every case shares."""
    world = start_world()
    if smoke:
        from transformers import LlamaConfig, LlamaForCausalLM

        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=512, **size)).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "model": {"source": str(folder) if smoke else EMBEDDED},
            "objective": {"name": "sft"},
            "training": {
                "zero_stage": 1,
                "micro_batch_size": SEQUENCES,
                "global_batch_size": SEQUENCES,
                "learning_rate": 1e-9,
            },
            "weight_penalties": [{"name": name} for name in WEIGHT_PENALTIES],
        }
    )
    return start_engine(LossModel(Policy(load_model(config.model)), SFTLoss()), config, world), config, world


def unchanged(batch: Batch) -> Batch:
    """A batch whose sequences say everything."""
    return batch


@dataclass(frozen=True)
class Case:
    """How one loss is put into the engine, and what its batch says of the same tokens."""

    objective: nn.Module
    penalties: tuple[nn.Module, ...] = ()
    roles: tuple[int, ...] = (CHOSEN,) * SEQUENCES
    kind: type[LossModel] = LossModel
    token_set: tuple[int, ...] = ()
    reference: bool = False
    fill: Callable[[Batch], Batch] = unchanged


def loss_case(name: str) -> Case:
    """The loss with its defaults; a penalty stands beside SFT."""
    half = SEQUENCES // 2
    token_set = tuple(range(10, 10 + TOKEN_SETS.get(name, 0)))
    given: dict[str, Any] = {"token_set": token_set} if token_set else {}
    if name == "grpo":
        given["beta"] = 0.04  # with the KL, so that it is in the figure
    loss = {**OBJECTIVES, **PENALTIES}[name](**given)
    if hasattr(loss, "bank"):
        loss.bank.items = torch.rand((loss.bank.capacity, 3), dtype=torch.float64)  # full, as it soon is
    if hasattr(loss, "fit"):
        loss.fit(torch.rand(256), torch.rand(256).round())
    needs = sections()["objective" if name in OBJECTIVES else "penalty", name].model_construct(**given).needs
    reference = needs.reference != "none"
    if needs.data == "rollouts":
        roles = (ANSWER,) * SEQUENCES
        return Case(loss, roles=roles, kind=HEADS[needs.module], reference=reference, fill=with_credit)
    if name in OBJECTIVES:
        roles = (CHOSEN, REJECTED) * half if needs.preferences else (CHOSEN,) * SEQUENCES
        fill = with_reference_point if needs.data == "unpaired" else unchanged
        return Case(loss, roles=roles, kind=HEADS[needs.module], token_set=token_set, reference=reference, fill=fill)
    extra = ANSWER if name in ANSWERING else QUERY if name in ASKING else CHOSEN
    roles = (CHOSEN,) * half + (extra,) * half
    return Case(SFTLoss(), (loss,), roles, token_set=token_set, reference=reference)


def with_reference_point(batch: Batch) -> Batch:
    """KTO's number of the step, whose own forward pass is not in the figure."""
    return replace(batch, reference_point=torch.zeros(()))


def with_credit(batch: Batch) -> Batch:
    """Advantages, log-probs and values of a rollout."""
    size = batch.targets.shape[0]
    return replace(
        batch,
        advantages=torch.ones(size),
        old_logprob=torch.full((size,), -1.0),
        old_values=torch.zeros(size),
        returns=torch.ones(size),
    )


def make_batch(case: Case, vocabulary: int, prompt: int = PROMPT, completion: int = COMPLETION) -> Batch:
    """The same tokens for every case."""
    ids = torch.randint(
        20, vocabulary, (len(case.roles), prompt + completion), generator=torch.Generator().manual_seed(0)
    )
    encoded = []
    for i, (role, row) in enumerate(zip(case.roles, ids.tolist(), strict=True)):
        grade = float(i % 2)
        if role == QUERY:
            row[prompt] = case.token_set[int(grade)]  # where the one-token answer stands
        graded = role in (ANSWER, QUERY)
        encoded.append(
            Encoded(
                tuple(row),
                prompt,
                role,
                i,
                pair_id=i // 2 if REJECTED in case.roles else -1,
                correct=grade if graded else math.nan,
                reference_logprobs=(-1.0,) * completion if case.reference else (),
            )
        )
    return case.fill(collate(encoded, 0))


def one_step(engine: Engine, case: Case, batch: Batch) -> tuple[float, float]:
    """Seconds, and peak memory in MiB above the level before, of one optimiser step."""
    module: Any = engine.module
    module.objective, module.penalties = case.objective, nn.ModuleList(case.penalties)
    module.__class__ = case.kind
    divisors = {name: count.clamp(min=1).float() for name, count in module.counts(batch).items()}
    gc.collect()
    before = reset_peak()
    start = time.perf_counter()
    loss, _ = engine.deepspeed(TrainStep(batch, divisors))
    engine.backward(loss, last=True)
    skipped, _ = engine.step()
    module.after_step()
    seconds = time.perf_counter() - start
    if skipped or not math.isfinite(float(loss.detach())):
        raise RuntimeError(f"{case.objective.name}: the step's gradients are not finite")  # its time would mean nothing
    return seconds, (memory("VmHWM") - before) / 1024


def measured(engine: Engine, name: str, case: Case, repeats: int) -> dict[str, Any]:
    """A row: the loss and plain SFT in turn, medians and spread."""
    module: Any = engine.module
    if not hasattr(module, "score"):
        module.score = scalar_head(module.policy, 0)  # of reward models and value heads; the others do not run it
    vocabulary = module.policy.causal_model.get_input_embeddings().weight.shape[0]
    plain = Case(SFTLoss())
    sides = {"plain": (plain, make_batch(plain, vocabulary)), "loss": (case, make_batch(case, vocabulary))}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, (one, batch) in sides.items():
            result = one_step(engine, one, batch)
            if repeat:  # the first is a warm-up
                found[side].append(result)
    seconds = {side: [one[0] for one in results] for side, results in found.items()}
    peaks = {side: statistics.median(one[1] for one in results) for side, results in found.items()}
    ratios = [loss / sft for loss, sft in zip(seconds["loss"], seconds["plain"], strict=True)]
    return {
        "loss": name,
        "time_ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": statistics.median(seconds["loss"]),
        "seconds_sft": statistics.median(seconds["plain"]),
        "memory_ratio": peaks["loss"] / peaks["plain"] if peaks["plain"] > 0 else math.nan,
        "peak_mib": peaks["loss"],
        "peak_mib_sft": peaks["plain"],
    }


def weight_penalty_rows(
    engine: Engine, config: RunConfig, world: World, repeats: int, smoke: bool
) -> list[dict[str, Any]]:
    """A row for each weight penalty, its steps between whole SFT steps."""
    module: Any = engine.module
    penalties: Mapping[str, Any] = build_weight_penalties(config, engine, world).penalties  # type: ignore[union-attr]
    vocabulary = module.policy.causal_model.get_input_embeddings().weight.shape[0]
    plain = Case(SFTLoss())
    batch = make_batch(plain, vocabulary, *((PROMPT, COMPLETION) if smoke else WHOLE_STEP))
    whole: list[tuple[float, float]] = []
    own: dict[str, list[float]] = {name: [] for name in penalties}
    peaks = dict.fromkeys(penalties, 0.0)
    step = 0
    for repeat in range(repeats + 1):
        taken = one_step(engine, plain, batch)
        if repeat:
            whole.append(taken)
        for name, penalty in penalties.items():
            before = reset_peak()
            for _ in range(4):  # each takes other matrices
                start = time.perf_counter()
                penalty.step(step, 1e-9)
                if repeat:
                    own[name].append(time.perf_counter() - start)
                step += 1
            peaks[name] = max(peaks[name], (memory("VmHWM") - before) / 1024 if repeat else 0.0)
    base = statistics.median(seconds for seconds, _ in whole)
    base_peak = statistics.median(peak for _, peak in whole)
    kept = {name: kept_mib(penalty) for name, penalty in penalties.items()}
    return [
        {
            "loss": name,
            "time_ratio": 1 + statistics.mean(times) / base,
            "lowest": 1 + min(times) / base,
            "highest": 1 + max(times) / base,
            "seconds": base + statistics.mean(times),
            "seconds_sft": base,
            "memory_ratio": (kept[name] + max(base_peak, peaks[name])) / base_peak if base_peak > 0 else math.nan,
            "peak_mib": peaks[name],
            "kept_mib": kept[name],
            "peak_mib_sft": base_peak,
        }
        for name, times in own.items()
    ]


def kept_mib(penalty: Any) -> float:
    """Size of what a penalty holds between steps: W0, and polar(W0) where it needs it."""
    held = [one for matrix in penalty.matrices for one in (matrix.initial, matrix.polar) if one is not None]
    return sum(one.numel() * one.element_size() for one in held) / 2**20


def memory(field: str) -> float:
    """A field of /proc/self/status in KiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) for line in lines if line.startswith(field)), math.nan)


def reset_peak() -> float:
    """Make the kernel count the peak from here. Returns the memory now, in KiB; NaN where the kernel does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return memory("VmRSS")


if __name__ == "__main__":
    main()

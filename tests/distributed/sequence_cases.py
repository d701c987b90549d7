"""Run by test_sequence_parallel under torchrun: one micro-batch passed whole, and shared by all ranks; and whole runs.

Usage: sequence_cases.py FOLDER [CONFIG ...]. Rank 0 writes FOLDER/passes-<ranks>.json. The configs are trained before, the
last of them once more in FOLDER/again, from its second step on.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from calibtrain.attention_names import told_by_length
from calibtrain.config_file import load_config
from calibtrain.config_losses import AnswerScoreConfig, ORPOConfig, SFTConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.distributed import World, barrier, leave_world, start_world
from calibtrain.losses import ANSWER, CHOSEN, REJECTED, build_loss
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.models import cpu_attention
from calibtrain.models.loss_model import LogprobStep, LossModel, StepStatistics, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.models.sequence_parallel import SequenceGroup, begin_sequence_group, check_in_parts, share_attention
from calibtrain.ops import TokenStats
from calibtrain.pipeline.train import run
from tests.flash import use_stand_in

VOCABULARY = 400


class SetPenalty(torch.nn.Module):
    """Reads what statistics do not say: log-probs of a few tokens at every target."""

    name = "set_penalty"
    token_set = torch.tensor([5, 17, 230])

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Completion tokens."""
        return {self.name: batch.is_completion.sum()}

    def forward(self, stats: TokenStats, batch: Batch, logprobs: torch.Tensor) -> dict[str, LossTerm]:
        """Mean squares, and entropy and Brier score, so that every number's gradient is asked for."""
        each = logprobs.square().sum(1) * 0.01 + stats.entropy + stats.sum_p2
        return {self.name: LossTerm(each[batch.is_completion].sum(), batch.is_completion.sum())}


def sequence(length: int, start: int, role: int, pair: int = -1, shift: int = 0) -> Encoded:
    """Tokens that no other sequence has; a pair's have their prompt alone in common."""
    ids = tuple((7 * t + t * t + (pair + 2) * 11 + (shift if t >= start else 0)) % VOCABULARY for t in range(length))
    return Encoded(ids, start, role, pair, pair, correct=float(shift % 2) if role == ANSWER else float("nan"))


def batches() -> dict[str, Batch]:
    """A long row; pairs behind their prompt, with graded answers; rows of several; a row that leaves a rank no target."""
    pairs = [
        sequence(length, 9, role, pair, shift=3 * role)
        for pair, lengths in enumerate(((40, 31), (23, 27)))
        for role, length in zip((CHOSEN, REJECTED), lengths, strict=True)
    ]
    answers = [sequence(15 + k, 8, ANSWER, shift=k) for k in range(2)]
    return {
        "long": collate([sequence(2000, 11, CHOSEN)], 2),
        "pairs": collate([*pairs, *answers], 2, "full", shared_prefix=True),
        "packed": collate([*pairs, *answers], 2, packing_tokens=96, pad_to_multiple=1),
        "early": collate([sequence(12, 9, CHOSEN, pair=0), sequence(44, 42, REJECTED, pair=0)], 2),
        "nothing": collate([], 2),
    }


def losses(name: str) -> list[torch.nn.Module]:
    """The objective, the score of whole answers, and a penalty on tokens."""
    objective = build_loss(SFTConfig() if name == "long" else ORPOConfig())
    return [objective, build_loss(AnswerScoreConfig(moves="all")), SetPenalty()]


def passed(model: LossModel, batch: Batch, scale: float) -> tuple[dict[str, torch.Tensor], StepStatistics]:
    """Gradients of one micro-batch, summed over the ranks that share it, and what it told."""
    model.zero_grad()
    loss, output = model(TrainStep(batch, dict.fromkeys(model.counts(batch), torch.tensor(scale))))
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    if model.shared_by is not None:
        for one in found.values():
            dist.all_reduce(one)
    return found, output


def compared(source: Path, name: str, batch: Batch, shared: SequenceGroup, **options: Any) -> dict[str, Any]:
    """Largest relative differences between a micro-batch passed whole and in parts; other passes stay what they were."""
    attention, dtype = options.get("attention", "sdpa"), options.get("dtype", torch.float32)
    loaded = "sdpa" if told_by_length(attention) else attention  # a stand-in is no package, which loading asks for
    causal = AutoModelForCausalLM.from_pretrained(source, attn_implementation=loaded, dtype=dtype)
    causal.config._attn_implementation = attention
    if options.get("checkpointing"):
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective, *penalties = losses(name)
    model = LossModel(Policy(causal), objective, penalties).train()
    whole, told = passed(model, batch, 7.0)
    share_attention(model.policy.model, shared)
    check_in_parts(model.policy, shared)
    model.shared_by = shared
    parts, told_in_parts = passed(model, batch, 7.0)
    alone, _ = model(LogprobStep(batch))  # not a TrainStep: whole again
    size = max(float(one.norm()) for one in whole.values())
    return {
        "gradients": max(float((parts[key] - whole[key]).norm()) / size if size else 0.0 for key in whole),
        "logprobs": _difference(told_in_parts.stats.logprob, told.stats.logprob),
        "alone": _difference(alone, told.stats.logprob),
        "correct": bool((told_in_parts.stats.correct == told.stats.correct).all()),
        "length": size,
        "terms": {key: [float(found.terms[key].total) for found in (told, told_in_parts)] for key in told.terms},
    }


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def main(folder: Path, world: World) -> None:
    """Every batch on a Llama; one on a Qwen, one checkpointed, one by lengths, one in bf16 on what a CPU has for it."""
    shared = begin_sequence_group(world.size)
    assert shared is not None
    made = batches()
    found = {name: compared(folder / "llama", name, batch, shared) for name, batch in made.items()}
    found["qwen"] = compared(folder / "qwen", "pairs", made["pairs"], shared)
    found["checkpointed"] = compared(folder / "llama", "pairs", made["pairs"], shared, checkpointing=True)
    use_stand_in(pytest.MonkeyPatch())
    found["lengths"] = compared(folder / "llama", "packed", made["packed"], shared, attention="flash_attention_2")
    found["window"] = compared(folder / "mistral", "packed", made["packed"], shared, attention="flash_attention_2")
    half = {"attention": cpu_attention.register(), "dtype": torch.bfloat16}
    found["bf16"] = compared(folder / "llama", "pairs", made["pairs"], shared, **half)
    if world.is_main:
        (folder / f"passes-{world.size}.json").write_text(json.dumps(found))


def go_on(path: Path, folder: Path, world: World) -> None:
    """Train what a finished run did behind its checkpoint of step 2."""
    again = folder / "again"
    if world.is_main:
        output = load_config(path, []).output_dir
        shutil.copytree(output, again, ignore=shutil.ignore_patterns("model", "step-0000003"))
    barrier()
    run(load_config(path, [f"output_dir={again}", "training.resume=auto"]))


if __name__ == "__main__":
    world, folder = start_world(), Path(sys.argv[1])
    for config in sys.argv[2:]:
        run(load_config(Path(config), []))
    if sys.argv[2:]:
        go_on(Path(sys.argv[-1]), folder, world)
    main(folder, world)
    leave_world()

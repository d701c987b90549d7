"""What hooks see: small frozen records, detached, never the trainer or the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from calibtrain.confidence.answer import Answer
from calibtrain.losses.terms import Batch, LossTerms
from calibtrain.losses.token_terms import answer_tokens
from calibtrain.ops import TokenStats


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Told once, before the first step."""

    config: Mapping[str, Any]  # resolved
    output_dir: Path
    total_steps: int
    first_step: int  # 0, or the step a resumed run starts from
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class MicroBatchRecord:
    """Told after each forward pass of this rank; the statistics are those of design.md's TokenStats, detached."""

    logprob: Tensor  # (N,) float32
    entropy: Tensor  # (N,)
    sum_p2: Tensor  # (N,)
    confidence: Tensor  # (N,)
    correct: Tensor  # (N,) bool
    sequence_ids: Tensor  # (N,)
    is_completion: Tensor  # (N,) bool; of answers without the reasoning before them
    roles: Tensor  # (S,)
    sequence_correct: Tensor  # (S,) float32: grade of own answers, NaN elsewhere
    term_sums: Mapping[str, Tensor]  # () each
    term_counts: Mapping[str, Tensor]  # () each
    pair_ids: Tensor | None = None  # (S,) int64 in [0, S), -1 outside pairs; without it no preference accuracy
    measures: LossTerms = field(default_factory=dict)  # what losses tell of themselves, detached

    @classmethod
    def of(
        cls, stats: TokenStats, batch: Batch, terms: LossTerms, measures: LossTerms | None = None
    ) -> MicroBatchRecord:
        """What one forward pass gave, detached."""
        detached = TokenStats(*(value.detach() for value in stats))
        return cls(
            *detached,
            sequence_ids=batch.sequence_ids,
            is_completion=answer_tokens(batch),
            roles=batch.roles,
            sequence_correct=batch.correct,
            term_sums={name: term.total.detach() for name, term in terms.items()},
            term_counts={name: term.count for name, term in terms.items()},
            pair_ids=batch.pair_ids,
            measures=measures or {},
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of this rank in a step."""

    flops: float = 0.0  # of the model, forward and backward; what is computed twice counts once
    data_seconds: float = 0.0  # until its batches were made
    waiting_seconds: float | None = None  # for the other ranks, where a collective blocks
    device_bytes: int | None = None  # the most that tensors have held on the device so far
    peak: float | None = None  # FLOP/s of the device, where they are known


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Told after each optimiser step, the same on every rank."""

    step: int  # 1 is the first finished step
    total_steps: int
    epoch: float
    learning_rate: float
    grad_norm: float | None
    skipped: bool  # gradients were not finite
    seconds: float
    tokens: int  # input tokens of this rank in the step
    logit_scale: float | None  # of the calibration term, when it has one
    weight_penalties: Mapping[str, float] = field(default_factory=dict)  # estimates, before the step
    rollouts: Mapping[str, float] = field(default_factory=dict)  # means over the round that the step learned from
    cost: StepCost = StepCost()


@dataclass(frozen=True, slots=True)
class LogRecord:
    """Told every log_every steps on every rank, with the merged numbers."""

    step: int
    total_steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """Told after an evaluation, on every rank; rank 0 gets the answers of all ranks in question order, the others none."""

    step: int
    split: str  # calibration, test, ...
    metrics: Mapping[str, float]
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class SpectraRecord:
    """Told after matrices were read against where the run began, on every rank."""

    step: int
    matrices: Mapping[str, Mapping[str, float]]  # module -> quantity -> value

    def metrics(self) -> dict[str, float]:
        """`spectra/<module>/<quantity>`, and means over the modules as `spectra/mean/<quantity>`."""
        named = {f"spectra/{name}/{key}": value for name, one in self.matrices.items() for key, value in one.items()}
        rows = list(self.matrices.values())
        means = {f"spectra/mean/{key}": sum(row[key] for row in rows) / len(rows) for key in (rows[0] if rows else ())}
        return {**means, **named}


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Told after a checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class EndRecord:
    """Told once, also when training failed."""

    step: int
    error: str | None
    summary: Mapping[str, Any]
    artifacts: Sequence[Path] = ()
    preempted: bool = False  # asked to stop, with its state kept: it will be gone on with

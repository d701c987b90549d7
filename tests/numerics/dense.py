"""A small head in float64 whose losses are computed twice: through the ops, and from all logits by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibtrain.losses.terms import Batch, mean_loss
from calibtrain.ops import fused_linear_token_stats, token_set_logprobs

NAN = float("nan")


class Row(NamedTuple):
    """One sequence: its targets, how many of them are of the prompt, and what the data says of it."""

    role: int
    targets: Sequence[int]
    prompt: int = 0
    correct: float = NAN
    record: int = 0


def batch_of(rows: Sequence[Row], reference_logprob: Tensor | None = None) -> Batch:
    """Batch of the rows; positions are not laid out, which no loss reads."""
    count = sum(len(row.targets) for row in rows)
    sizes = torch.tensor([len(row.targets) for row in rows], dtype=torch.int64)
    flat = torch.zeros((1, count), dtype=torch.int64)
    return Batch(
        input_ids=flat,
        position_ids=flat,
        segment_ids=torch.ones_like(flat, dtype=torch.int32),
        target_positions=torch.arange(count),
        targets=torch.tensor([one for row in rows for one in row.targets], dtype=torch.int64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(rows)), sizes),
        is_completion=torch.tensor(
            [t >= row.prompt for row in rows for t in range(len(row.targets))], dtype=torch.bool
        ),
        roles=torch.tensor([row.role for row in rows], dtype=torch.int64),
        pair_ids=torch.full((len(rows),), -1, dtype=torch.int64),
        correct=torch.tensor([row.correct for row in rows], dtype=torch.float32),
        record_ids=torch.tensor([row.record for row in rows], dtype=torch.int64),
        reference_logprob=reference_logprob,
    )


class Head:
    """Leaves `hidden` (N, H) and `weight` (V, H) in float64; `sharp` scales the logits, so that some p are near 1."""

    def __init__(self, count: int, vocabulary: int = 23, sharp: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = (sharp * torch.randn(count, 7, generator=generator, dtype=torch.float64)).requires_grad_()
        self.weight = torch.randn(vocabulary, 7, generator=generator, dtype=torch.float64).requires_grad_()

    @property
    def logits(self) -> Tensor:
        """All of them, (N, V)."""
        return self.hidden @ self.weight.t()

    def through_ops(self, loss: Any, batch: Batch) -> Tensor:
        """The module's mean loss from token statistics."""
        stats = fused_linear_token_stats(self.hidden, self.weight, batch.targets)
        more = ()
        if getattr(loss, "token_set", None) is not None:
            more = (token_set_logprobs(self.hidden, self.weight, batch.targets, stats.logprob, loss.token_set),)
        return mean_loss(loss(stats, batch, *more))

    def gradients(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden and weight."""
        return torch.autograd.grad(value, (self.hidden, self.weight))

    def assert_equals(
        self, loss: Any, batch: Batch, dense: Callable[[Tensor], Tensor], tolerance: float = 1e-11
    ) -> None:
        """The module through the ops and `dense`, a function of all logits, agree in value and gradients."""
        ours, theirs = self.through_ops(loss, batch), dense(self.logits)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        for actual, expected in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

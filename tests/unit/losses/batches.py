"""Batches of random sequences for tests of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from calibtrain.losses import Batch
from calibtrain.ops import TokenStats


class Example(NamedTuple):
    role: int
    pair: int
    prompt_logprobs: list[float]
    completion_logprobs: list[float]
    correct: float = float("nan")


def make_batch(
    sequences: Sequence[Example], dtype: torch.dtype = torch.float64
) -> tuple[TokenStats, Batch, torch.Tensor]:
    """Stats, batch and the leaf log-probs (N,). Pair ids are made dense, as the collator does."""
    logprobs = [p for s in sequences for p in [*s.prompt_logprobs, *s.completion_logprobs]]
    is_completion = [
        c for s in sequences for c in [*([False] * len(s.prompt_logprobs)), *([True] * len(s.completion_logprobs))]
    ]
    sizes = torch.tensor([len(s.prompt_logprobs) + len(s.completion_logprobs) for s in sequences], dtype=torch.long)
    dense = {pair: i for i, pair in enumerate(sorted({s.pair for s in sequences if s.pair >= 0}))}
    count = len(logprobs)
    leaf = torch.tensor(logprobs, dtype=dtype).requires_grad_()
    zeros = torch.zeros_like(leaf)
    batch = Batch(
        input_ids=torch.zeros((1, count), dtype=torch.long),
        position_ids=torch.zeros((1, count), dtype=torch.long),
        segment_ids=torch.ones((1, count), dtype=torch.int32),
        target_positions=torch.arange(count),
        targets=torch.zeros(count, dtype=torch.long),
        sequence_ids=torch.repeat_interleave(torch.arange(len(sequences)), sizes),
        is_completion=torch.tensor(is_completion, dtype=torch.bool),
        roles=torch.tensor([s.role for s in sequences], dtype=torch.long),
        pair_ids=torch.tensor([dense.get(s.pair, -1) for s in sequences], dtype=torch.long),
        correct=torch.tensor([s.correct for s in sequences], dtype=torch.float32),
        record_ids=torch.arange(len(sequences)),
    )
    return TokenStats(leaf, zeros, zeros, zeros, zeros > 0), batch, leaf

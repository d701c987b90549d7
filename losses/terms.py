"""What every loss takes and returns: a Batch beside the TokenStats of its targets, and LossTerms (sums and counts)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.silence import watch_of
from calibtrain.ops import TokenStats, at_least_float32

CHOSEN, REJECTED, ANSWER, QUERY = 0, 1, 2, 3
"""Roles of a sequence: a completion to learn (SFT or preferred), a dispreferred one, the model's own graded answer, and
a question about such an answer, answered by its first completion token (correctness_query, tokenized_brier)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: R rows of T tokens holding S sequences with N target tokens in all; padding is never a target.

    Padded (one sequence a row), packed (several, attention blocked between them) and shared-prefix batches (a prompt once,
    then its completions, blind to each other) look the same to a loss, which reads only the fields from `targets` on.
    """

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor  # (R, T) int64, restart at 0 with each sequence
    segment_ids: Tensor  # (R, T) int32: 0 is padding, k >= 1 the k-th sequence (or shared prompt) of the row
    target_positions: Tensor  # (N,) int64: r * T + t of the hidden state that predicts the target
    targets: Tensor  # (N,) int64 token ids
    sequence_ids: Tensor  # (N,) int64 in [0, S), ascending
    is_completion: Tensor  # (N,) bool; False for prompt tokens, which are targets only with nll_scope=full
    roles: Tensor  # (S,) int64: CHOSEN, REJECTED, ANSWER or QUERY
    pair_ids: Tensor  # (S,) int64: chosen and rejected of a pair share one in [0, P); -1 elsewhere
    correct: Tensor  # (S,) float32: grade of an own answer (or of the one asked about), 0 or 1; NaN elsewhere
    record_ids: Tensor  # (S,) int64: index of the record in its split, for messages
    # (R, T) int32: 0 is seen by its whole segment, b >= 1 is the b-th completion after a shared prompt; None: each row
    # holds one sequence
    branch_ids: Tensor | None = None
    # (K + 1,) int32: where sequences begin in the flattened rows, a row's padding as one, and R * T; None: not counted
    starts: Tensor | None = None
    # Of sampled completions (ANSWER) in reinforcement learning, float32, without gradient:
    advantages: Tensor | None = None  # (N,) credit of each token
    old_logprob: Tensor | None = None  # (N,) under the policy that sampled; None: under this very one
    old_values: Tensor | None = None  # (N,) of the value head when the completion was sampled
    returns: Tensor | None = None  # (N,) what the value head is to predict
    scores: Tensor | None = None  # output of a scalar head, differentiable: (S,) rewards, or (N,) values
    reference_logprob: Tensor | None = None  # (N,) float32 under a frozen reference; NaN where not known, None: nowhere
    reference_point: Tensor | None = None  # () KTO's z0, of the whole step, without gradient
    weights: Tensor | None = (
        None  # (S,) float64: how much each sequence counts, where the loss weighs them; None: alike
    )
    is_answer: Tensor | None = None  # (N,) bool: completion tokens that are the answer, behind its reasoning; None: all
    importance: Tensor | None = None  # (N,) weight of each token where another policy sampled it, data; None: 1

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one sequence. Raises UserError where `branch_ids` does not tell that one does."""
        self._check_rows()
        return self.branch_ids is not None

    def to(self, device: torch.device | str) -> Batch:
        """Copy with every tensor on `device`. Raises UserError as `packed` does."""
        self._check_rows()
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None})

    def _check_rows(self) -> None:
        """Rows of several sequences without `branch_ids` would see each other. A GPU is not waited for to find out."""
        if self.branch_ids is not None or self.segment_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool((self.segment_ids > 1).any()):
            raise UserError(
                "Batch: a row of segment_ids holds more than one sequence, and branch_ids is None, so that they would see "
                "each other; set branch_ids (zeros where no prompt is shared), or make the batch with collate or "
                "batch_from_labels"
            )


def sequence_starts(segment_ids: Tensor) -> Tensor:
    """`Batch.starts` of rows (R, T). (K + 1,) int32."""
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    places = first.flatten().nonzero()[:, 0]
    return torch.cat([places, places.new_tensor([segment_ids.numel()])]).int()


def row_lengths(batch: Batch) -> dict[str, Any]:
    """What FlashAttention is told of the sequences of packed rows, by transformers' names.

    Where the batch has not counted `starts`, its device is waited for. Raises UserError for completions that share a prompt,
    which lengths cannot tell.
    """
    starts = batch.starts
    if starts is None:
        if batch.branch_ids is not None and bool((batch.branch_ids > 0).any()):
            raise UserError(
                "the batch's completions share their prompts, of which FlashAttention cannot be told: pass each prompt with "
                "each completion (data.shared_prefix: false), or take another attention"
            )
        starts = sequence_starts(batch.segment_ids)
    width = batch.input_ids.shape[1]  # no sequence is longer; how long the longest is, the device would have to tell
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": width, "max_length_k": width}


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A sum over items and what normalises it: the trainer divides by the count over all ranks and micro-batches."""

    total: Tensor  # () differentiable sum
    count: Tensor  # () int64 items of this micro-batch, or their weights' sum; a function of the data alone
    weight: float = 1.0


LossTerms = Mapping[str, LossTerm]


class Objective(Protocol):
    """What the trainer asks of an objective or a penalty, which are `torch.nn.Module`s.

    Three more things it may have. `measures(stats, batch)`, with `measured`, its names: sums and counts that are logged,
    not learnt. `token_set` (K,) int64: tokens whose log-probs at all targets it also reads; it is then
    called with a third argument, (N, K), made by `calibtrain.ops.token_set_logprobs`. `after_step()`: called on every
    rank after each optimiser step; collectives are allowed in it.
    """

    name: str

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count of each term from the data alone, so that an accumulation window is counted before its first pass."""
        ...

    def __call__(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """The terms of one micro-batch; their counts equal `counts(batch)`."""
        ...


def mean_loss(terms: LossTerms) -> Tensor:
    """Weighted sum of the terms, each over its own count: the loss of one process and one micro-batch. () float32.

    Logs once that a micro-batch had nothing for any term, and that a term finds nothing in its first 20.
    """
    watch_of(tuple(sorted(terms))).see({name: term.count for name, term in terms.items()}, "a micro-batch")
    return normalized_loss(terms, {name: term.count for name, term in terms.items()})


def normalized_loss(terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
    """Weighted sum of the terms, each over `counts[name]`: one micro-batch's share of a step's loss. () float32.

    Summed over the micro-batches and ranks that `global_counts` counted, it is the loss of the whole step, however that
    was cut. Where gradients are averaged over ranks (DDP, DeepSpeed), multiply by their number.
    """
    parts = [term.weight * term.total / divisor(counts[name]).to(term.total) for name, term in terms.items()]
    return torch.stack(parts).sum()


def divisor(count: Tensor) -> Tensor:
    """The count, or 1 where there is nothing to divide."""
    return torch.where(count > 0, count, torch.ones_like(count))


def global_counts(loss: Objective, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Each term's count over `batches`, the accumulation window of this rank, and over all ranks. () float64 each.

    Collective where torch.distributed is initialised: one all-reduce, so every rank calls it, with one batch at least.
    Logs once that a step had nothing for any term, and that a term finds nothing in its first 20 steps. Raises UserError
    without a batch.
    """
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in loss.counts(batch).items():
            counts[name] = counts.get(name, 0) + count.double()
    if not counts:
        raise UserError("global_counts: there is no batch to count; every rank needs one at least")
    names = sorted(counts)
    totals = torch.stack([counts[name] for name in names])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    counts = dict(zip(names, totals, strict=True))
    watch_of(loss).see(counts, "an optimiser step")
    return counts


def sequence_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum of `values` (N,) over the tokens of each sequence, half precision in float32. (S,), 0 where it has no token."""
    values = at_least_float32(values) if values.is_floating_point() else values
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)


def sequence_token_counts(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Number of tokens of each sequence where `mask` (N,) bool holds. Returns (S,) int64."""
    return sequence_sums(mask.long(), sequence_ids, num_sequences)

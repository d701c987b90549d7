"""From a collator's tensors with labels to a Batch: which tokens are targets, and where each sequence of a row begins."""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch

IGNORED = -100
"""Label of a token that is no target, as in `torch.nn.functional.cross_entropy` and every Hugging Face collator."""


def batch_from_labels(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    pairs: bool = False,
) -> Batch:
    """Batch of a collator's tensors, all (R, T): the targets are the labels that are not -100, not shifted.

    Args:
        input_ids: int64.
        labels: int64; `labels[r, t]` is predicted by the hidden state at t - 1. A sequence's first token is never a target.
        attention_mask: 0 on padding, on either side; None for none.
        position_ids: restart at 0 with each sequence of a packed row; None for one sequence a row.
        completion_mask: False for prompt tokens among the targets (for losses with nll_scope=full); None for none.
        pairs: the rows are the chosen completions followed by the rejected ones in the same order, as TRL's preference
            collators lay them out.

    Raises:
        UserError: shapes or dtypes do not fit, position_ids do not rise by one from 0 in each sequence, or `pairs` with an
            odd number of rows or packed ones.
    """
    _check_shapes(input_ids, labels, attention_mask, position_ids, completion_mask)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if position_ids is None:
        segments, misplaced = real.int(), None
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
    else:
        segments = ((position_ids == 0) & real).cumsum(1).int() * real
        misplaced = _misplaced(position_ids, real)
    in_row = segments.amax(1).clamp(min=1).long()  # a row of padding is an empty sequence
    first = in_row.cumsum(0) - in_row
    predicted = (labels[:, 1:] != IGNORED) & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    rows, columns = predicted.nonzero(as_tuple=True)
    num_sequences = _count_sequences(in_row, misplaced, position_ids)
    roles, pair_ids = _roles(num_sequences, input_ids, pairs)
    is_completion = torch.ones_like(rows, dtype=torch.bool)
    if completion_mask is not None:
        is_completion = completion_mask[rows, columns + 1].bool()
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segments,
        target_positions=rows * input_ids.shape[1] + columns,
        targets=labels[rows, columns + 1],
        sequence_ids=first[rows] + segments[rows, columns + 1].long() - 1,
        is_completion=is_completion,
        roles=roles,
        pair_ids=pair_ids,
        correct=torch.full((num_sequences,), float("nan"), device=input_ids.device),
        record_ids=torch.arange(num_sequences, device=input_ids.device),
        branch_ids=torch.zeros_like(segments) if num_sequences > input_ids.shape[0] else None,
    )


def _check_shapes(input_ids: Tensor, labels: Tensor, *others: Tensor | None) -> None:
    if input_ids.ndim != 2 or labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise UserError(
            f"input_ids and labels must be (R, T) int64 alike, got {tuple(input_ids.shape)} {input_ids.dtype} and "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    for name, tensor in zip(("attention_mask", "position_ids", "completion_mask"), others, strict=True):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise UserError(f"{name} must be {tuple(input_ids.shape)} as input_ids, got {tuple(tensor.shape)}")


def _misplaced(position_ids: Tensor, real: Tensor) -> Tensor:
    """Tokens that neither begin a sequence at 0 nor follow the token before them: nothing says whose they are. (R, T)."""
    follows = torch.zeros_like(real)
    follows[:, 1:] = real[:, :-1] & (position_ids[:, 1:] == position_ids[:, :-1] + 1)
    return real & ~follows & (position_ids != 0)


def _count_sequences(in_row: Tensor, misplaced: Tensor | None, position_ids: Tensor) -> int:
    """Sequences of all rows. The device is waited for once. Raises UserError where positions are `misplaced`."""
    if misplaced is None:
        return int(in_row.sum())
    count, wrong = torch.stack([in_row.sum(), misplaced.sum()]).tolist()
    if wrong:
        row, column = misplaced.nonzero()[0].tolist()
        raise UserError(
            f"position_ids: row {row} has {int(position_ids[row, column])} at token {column}: in each sequence they start "
            "at 0 and rise by one, or it cannot be told from its neighbours; where this is padding, give attention_mask"
        )
    return int(count)


def _roles(num_sequences: int, input_ids: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Roles and pair ids, (S,) int64 each."""
    roles = torch.full((num_sequences,), CHOSEN, device=input_ids.device)
    if not pairs:
        return roles, torch.full_like(roles, -1)
    half, odd = divmod(num_sequences, 2)
    if odd or num_sequences != input_ids.shape[0]:
        raise UserError(
            f"pairs: {num_sequences} sequences in {input_ids.shape[0]} rows; there must be one a row, the chosen ones "
            "first and then as many rejected ones"
        )
    roles[half:] = REJECTED
    return roles, torch.arange(num_sequences, device=input_ids.device) % half

"""Sequences as the tensors of one micro-batch, one a row or packed; and prompts as a batch to generate from.

What a loss reads is the same to the last bit however the rows are laid out: sequences keep the order they came in, and
only the positions of their targets differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calibtrain.data.encode import Encoded
from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, Batch


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    nll_scope: Literal["completion", "full"] = "completion",
    packing_tokens: int | None = None,
    pad_to_multiple: int = 8,
) -> Batch:
    """Micro-batch of the sequences, right-padded; with `packing_tokens`, packed into rows of at most so many tokens.

    The hidden state at t predicts token t + 1. Completion tokens are targets; with nll_scope=full so are the prompt
    tokens of CHOSEN sequences after the first. No sequences give one row of padding, so that forward still runs. Raises
    UserError for a sequence longer than packing_tokens.
    """
    rows = [[i] for i in range(len(encoded))] if packing_tokens is None else pack_rows(encoded, packing_tokens)
    width = max((sum(len(encoded[i].ids) for i in row) for row in rows), default=1)
    width = -(-width // pad_to_multiple) * pad_to_multiple
    input_ids = torch.full((max(1, len(rows)), width), pad_id, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    segment_ids = torch.zeros(input_ids.shape, dtype=torch.int32)
    starts = [0] * len(encoded)  # flat position of each sequence's first token
    for r, row in enumerate(rows):
        t = 0
        for segment, i in enumerate(row, start=1):
            length = len(encoded[i].ids)
            input_ids[r, t : t + length] = torch.tensor(encoded[i].ids, dtype=torch.int64)
            position_ids[r, t : t + length] = torch.arange(length)
            segment_ids[r, t : t + length] = segment
            starts[i] = r * width + t
            t += length
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        **_targets(encoded, starts, nll_scope),
        roles=torch.tensor([one.role for one in encoded], dtype=torch.int64),
        pair_ids=torch.tensor(_pair_numbers(encoded), dtype=torch.int64),
        correct=torch.tensor([one.correct for one in encoded], dtype=torch.float32),
        record_ids=torch.tensor([one.record_id for one in encoded], dtype=torch.int64),
    )


def pack_rows(encoded: Sequence[Encoded], packing_tokens: int) -> list[list[int]]:
    """Indices of the sequences in each row, by first-fit decreasing: at most 11/9 of the fewest rows, plus one.

    Raises UserError for a sequence longer than packing_tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), i)):
        length = len(encoded[i].ids)
        if length > packing_tokens:
            raise UserError(
                f"record {encoded[i].record_id}: its sequence of {length} tokens does not fit into data.packing_tokens "
                f"{packing_tokens}; raise it to data.max_length"
            )
        r = next((r for r, free in enumerate(room) if free >= length), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(packing_tokens)
        rows[r].append(i)
        room[r] -= length
    return rows


def _targets(encoded: Sequence[Encoded], starts: Sequence[int], nll_scope: str) -> dict[str, Tensor]:
    positions: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    is_completion: list[bool] = []
    for s, (one, start) in enumerate(zip(encoded, starts, strict=True)):
        first = 1 if nll_scope == "full" and one.role == CHOSEN else one.completion_start
        last = len(one.ids)
        positions.extend(range(start + first - 1, start + last - 1))
        targets.extend(one.ids[first:])
        sequence_ids.extend([s] * (last - first))
        is_completion.extend(t >= one.completion_start for t in range(first, last))
    return {
        "target_positions": torch.tensor(positions, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "sequence_ids": torch.tensor(sequence_ids, dtype=torch.int64),
        "is_completion": torch.tensor(is_completion, dtype=torch.bool),
    }


def _pair_numbers(encoded: Sequence[Encoded]) -> list[int]:
    """Pair ids as 0 ... P - 1 in order of appearance; a record that is twice in the batch makes two pairs."""
    seen: Counter[tuple[int, int]] = Counter()
    numbers: dict[tuple[int, int], int] = {}
    result = []
    for one in encoded:
        if one.pair_id < 0:
            result.append(-1)
            continue
        key = (one.pair_id, seen[one.pair_id, one.role])
        seen[one.pair_id, one.role] += 1
        result.append(numbers.setdefault(key, len(numbers)))
    return result


class PromptBatch(NamedTuple):
    """Left-padded prompts: the last column holds the last token of each."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 on padding
    position_ids: Tensor  # (B, T) int64, 0 at each prompt's first token


def prompt_batch(prompts: Sequence[Sequence[int]], pad_id: int) -> PromptBatch:
    """Prompts to generate from, padded on the left to the longest. Raises UserError for none or an empty one."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("there must be at least one prompt to generate from, and none may be empty")
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for r, prompt in enumerate(prompts):
        input_ids[r, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        attention_mask[r, width - len(prompt) :] = 1
    return PromptBatch(input_ids, attention_mask, (attention_mask.cumsum(1) - 1).clamp(min=0))

"""Sequences as the tensors of one micro-batch, one a row or packed.

What a loss reads is the same to the last bit however the rows are laid out: sequences keep the order they came in, and
only the positions of their targets differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calibtrain.data.encode import Encoded
from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, Batch, sequence_starts


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    nll_scope: Literal["completion", "full"] = "completion",
    packing_tokens: int | None = None,
    pad_to_multiple: int = 8,
    shared_prefix: bool = False,
) -> Batch:
    """Micro-batch of the sequences, right-padded; with `packing_tokens`, packed into rows of at most so many tokens.

    With `shared_prefix`, neighbours with one and the same prompt pass it once, and their completions' last tokens, which
    predict nothing, not at all. The hidden state at t predicts token t + 1. Completion tokens are targets (where a sequence
    has labels, those); with nll_scope=full so are the other tokens of CHOSEN sequences after the first. No sequences give
    one row of padding, so that forward still runs. Raises UserError for a sequence longer than packing_tokens.
    """
    units = _units(encoded, shared_prefix)
    laid_out = [_lay_out([encoded[i] for i in unit], shared_prefix) for unit in units]
    lengths = [len(unit.ids) for unit in laid_out]
    rows = [[u] for u in range(len(units))]
    if packing_tokens is not None:
        rows = _pack(lengths, packing_tokens, [encoded[unit[0]].record_id for unit in units])
    width = max((sum(lengths[u] for u in row) for row in rows), default=1)
    width = -(-width // pad_to_multiple) * pad_to_multiple
    input_ids = torch.full((max(1, len(rows)), width), pad_id, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    segment_ids = torch.zeros(input_ids.shape, dtype=torch.int32)
    branch_ids = torch.zeros(input_ids.shape, dtype=torch.int32)
    states: list[list[int]] = [[] for _ in encoded]  # flat position of each token of each sequence
    for r, row in enumerate(rows):
        t = 0
        for segment, u in enumerate(row, start=1):
            unit = laid_out[u]
            end = t + lengths[u]
            input_ids[r, t:end] = torch.tensor(unit.ids, dtype=torch.int64)
            position_ids[r, t:end] = torch.tensor(unit.positions, dtype=torch.int64)
            branch_ids[r, t:end] = torch.tensor(unit.branches, dtype=torch.int32)
            segment_ids[r, t:end] = segment
            for i, offsets in zip(units[u], unit.offsets, strict=True):
                states[i] = [r * width + t + offset for offset in offsets]
            t = end
    blocked = any(len(row) > 1 for row in rows) or any(len(unit) > 1 for unit in units)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        **_targets(encoded, states, nll_scope),
        roles=torch.tensor([one.role for one in encoded], dtype=torch.int64),
        pair_ids=torch.tensor(_pair_numbers(encoded), dtype=torch.int64),
        correct=torch.tensor([one.correct for one in encoded], dtype=torch.float32),
        record_ids=torch.tensor([one.record_id for one in encoded], dtype=torch.int64),
        branch_ids=branch_ids if blocked else None,
        starts=sequence_starts(segment_ids) if blocked and all(len(unit) == 1 for unit in units) else None,
        weights=_weights(encoded),
        reference_logprob=_reference_logprob(encoded, nll_scope),
        is_answer=_is_answer(encoded, nll_scope),
    )


class _Unit(NamedTuple):
    """What stands together in a row: a sequence, or several that share their prompt."""

    ids: list[int]
    positions: list[int]
    branches: list[int]  # 0 for what all see
    offsets: list[list[int]]  # of each sequence: where in the unit its tokens are


def row_tokens(sequences: Sequence[Encoded], packing_tokens: int | None, shared_prefix: bool) -> int:
    """What a record's sequences cost in a micro-batch: the tokens that they add packed, else those of its longest row."""
    units = _units(sequences, shared_prefix)
    lengths = [len(_lay_out([sequences[i] for i in unit], shared_prefix).ids) for unit in units]
    return max(lengths, default=0) if packing_tokens is None else sum(lengths)


def _units(encoded: Sequence[Encoded], shared_prefix: bool) -> list[list[int]]:
    """Runs of neighbours with the same prompt, or each sequence for itself."""
    if not shared_prefix:
        return [[i] for i in range(len(encoded))]
    units: list[list[int]] = []
    for i, one in enumerate(encoded):
        start = one.completion_start
        previous = encoded[units[-1][0]] if units else None
        if previous and previous.completion_start == start and previous.ids[:start] == one.ids[:start]:
            units[-1].append(i)
        else:
            units.append([i])
    return units


def _lay_out(sequences: Sequence[Encoded], shared_prefix: bool) -> _Unit:
    if not shared_prefix:
        length = len(sequences[0].ids)
        return _Unit(list(sequences[0].ids), list(range(length)), [0] * length, [list(range(length))])
    start = sequences[0].completion_start
    unit = _Unit(list(sequences[0].ids[:start]), list(range(start)), [0] * start, [])
    for branch, one in enumerate(sequences, start=1):
        completion = one.ids[start:-1]
        first = len(unit.ids)
        unit.offsets.append([*range(start), *range(first, first + len(completion))])
        unit.ids.extend(completion)
        unit.positions.extend(range(start, start + len(completion)))
        unit.branches.extend([branch] * len(completion))
    return unit


def pack_rows(encoded: Sequence[Encoded], packing_tokens: int) -> list[list[int]]:
    """Indices of the sequences in each row: as few rows as first-fit decreasing needs, filled evenly where that fits.

    First-fit decreasing needs at most 11/9 of the fewest rows, plus one; even rows need the least padding. Raises
    UserError for a sequence longer than packing_tokens.
    """
    return _pack([len(one.ids) for one in encoded], packing_tokens, [one.record_id for one in encoded])


def _pack(lengths: Sequence[int], packing_tokens: int, record_ids: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > packing_tokens:
            raise UserError(
                f"record {record_ids[i]}: its sequence of {lengths[i]} tokens does not fit into data.packing_tokens "
                f"{packing_tokens}; raise it to data.max_length"
            )
        r = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(packing_tokens)
        rows[r].append(i)
        room[r] -= lengths[i]
    even = _spread(lengths, len(rows))
    return min(rows, even, key=lambda layout: max((sum(lengths[i] for i in row) for row in layout), default=0))


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The sequences over `count` rows, longest first, each to the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = loads.index(min(loads))
        rows[r].append(i)
        loads[r] += lengths[i]
    return rows


def _targets(encoded: Sequence[Encoded], states: Sequence[Sequence[int]], nll_scope: str) -> dict[str, Tensor]:
    positions: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    is_completion: list[bool] = []
    for s, (one, state) in enumerate(zip(encoded, states, strict=True)):
        first = _first_target(one, nll_scope)
        last = len(one.ids)
        if one.labels:
            places, learned, completes = _labelled(one, nll_scope)
            positions.extend(state[t - 1] for t in places)
        else:
            learned, completes = list(one.ids[first:]), [t >= one.completion_start for t in range(first, last)]
            positions.extend(state[first - 1 : last - 1])
        targets.extend(learned)
        sequence_ids.extend([s] * len(learned))
        is_completion.extend(completes)
    return {
        "target_positions": torch.tensor(positions, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "sequence_ids": torch.tensor(sequence_ids, dtype=torch.int64),
        "is_completion": torch.tensor(is_completion, dtype=torch.bool),
    }


def _labelled(one: Encoded, nll_scope: str) -> tuple[list[int], list[int], list[bool]]:
    """Places of the targets of a sequence with labels, what is learned there, and whether it is the assistant's."""
    full = nll_scope == "full" and one.role == CHOSEN
    found = {t: (one.ids[t], False) for t in range(1, len(one.ids))} if full else {}
    found |= {t: (label, True) for t, label in one.learned}
    return list(found), [target for target, _ in found.values()], [completes for _, completes in found.values()]


def _first_target(one: Encoded, nll_scope: str) -> int:
    return 1 if nll_scope == "full" and one.role == CHOSEN else one.completion_start


def _is_answer(encoded: Sequence[Encoded], nll_scope: str) -> Tensor | None:
    """Which targets are answers, without the reasoning around them; None where all completions are nothing else."""
    if all(one.answer_span is None for one in encoded):
        return None
    found: list[bool] = []
    for one in encoded:
        if one.labels:  # several turns, each of them answers, and what stands between them where it is learned too
            found.extend(_labelled(one, nll_scope)[2])
            continue
        start, stop = one.answer_span or (0, one.completion_length)
        places = range(_first_target(one, nll_scope) - one.completion_start, one.completion_length)
        found.extend(start <= place < stop for place in places)
    return torch.tensor(found, dtype=torch.bool)


def _reference_logprob(encoded: Sequence[Encoded], nll_scope: str) -> Tensor | None:
    """Reference log-probs of all targets, NaN where there are none. Raises UserError unless they fit their sequence."""
    if not any(one.reference_logprobs for one in encoded):
        return None
    values: list[float] = []
    for one in encoded:
        found = list(one.reference_logprobs) or [math.nan] * one.completion_length
        if len(found) != one.completion_length:
            raise UserError(
                f"record {one.record_id}: {len(found)} reference log-probs for {one.completion_length} completion tokens"
            )
        first = _first_target(one, nll_scope)
        if one.labels:
            rest = iter(found)
            values += [next(rest) if completes else math.nan for completes in _labelled(one, nll_scope)[2]]
        else:
            values += [math.nan] * (one.completion_start - first) + found
    return torch.tensor(values, dtype=torch.float32)


def _weights(encoded: Sequence[Encoded]) -> Tensor | None:
    if all(one.weight == 1.0 for one in encoded):
        return None
    return torch.tensor([one.weight for one in encoded], dtype=torch.float64)


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

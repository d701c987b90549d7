"""Answers that are desirable or not, each for itself, and the answers to other prompts that KTO compares them with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, cut_left
from calibtrain.errors import UserError
from calibtrain.losses.terms import REJECTED
from calibtrain.records import Record


def unpair(records: Sequence[Record], drops: DropReport) -> list[Record]:
    """Each pair as a desirable and an undesirable answer, one behind the other; a pair of equal answers is dropped."""
    found = []
    for record in records:
        if record.chosen is None or record.rejected is None:
            found.append(record)
        elif record.chosen == record.rejected:
            drops.drop("chosen and rejected are the same answer", record.origin or record.question)
        else:
            found += [replace(record, rejected=None), replace(record, chosen=None)]
    return found


def mismatched(examples: Sequence[Encoded], max_length: int, bos_id: int | None) -> list[Encoded]:
    """Each example's prompt with the answer to another one: all answers once, where no prompt has more than half of them.

    A function of the data alone: neither ranks nor micro-batches matter. Prompts are cut as in training. Raises UserError
    where there is only one prompt.
    """
    found = []
    for one, other in zip(examples, _partners([one.ids[: one.completion_start] for one in examples]), strict=True):
        answer = examples[other].ids[examples[other].completion_start :]
        prompt = cut_left(one.ids[: one.completion_start], max_length - len(answer), bos_id)
        found.append(Encoded((*prompt, *answer), len(prompt), REJECTED, one.record_id))
    return found


def _partners(prompts: Sequence[Hashable]) -> list[int]:
    """For each place one with another prompt."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[prompt].append(place)
    if len(groups) < 2:
        raise UserError(
            "unpaired answers are compared with answers to other prompts, and all training records have the same prompt"
        )
    order = [place for group in groups.values() for place in group]
    largest = max(groups.values(), key=len)
    rest = [place for place in order if prompts[place] != prompts[largest[0]]]
    found = [0] * len(order)
    for i, place in enumerate(order):
        # As far round as the largest group is long is out of every group, unless that one is more than half.
        other = order[i - len(largest)]
        found[place] = other if prompts[other] != prompts[place] else rest[i % len(rest)]
    return found

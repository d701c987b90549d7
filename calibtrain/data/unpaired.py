"""Answers that are desirable or not, each for itself, and the answers to other prompts that KTO compares them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, cut_left
from calibtrain.data.records import Record
from calibtrain.errors import UserError
from calibtrain.losses.terms import REJECTED


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
    """Each example's prompt with the answer of the last example before it that has another prompt; they go round.

    A function of the data alone: neither ranks nor micro-batches matter. Prompts are cut as in training. Raises UserError
    where there is only one prompt.
    """
    prompts = [one.ids[: one.completion_start] for one in examples]
    other = next((j for j in reversed(range(len(prompts))) if prompts[j] != prompts[0]), None)
    if other is None:
        raise UserError(
            "unpaired answers are compared with answers to other prompts, and all training records have the same prompt"
        )
    found = []
    for i, one in enumerate(examples):
        if i and prompts[i - 1] != prompts[i]:
            other = i - 1  # else the last one is still the last with another prompt
        answer = examples[other].ids[examples[other].completion_start :]
        prompt = cut_left(prompts[i], max_length - len(answer), bos_id)
        found.append(Encoded((*prompt, *answer), len(prompt), REJECTED, one.record_id))
    return found

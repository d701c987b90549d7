"""Preference pairs whose rejected answer is the model's own wrong one, and pairs of stated confidences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.short_answer import SHORT_ANSWER
from calibtrain.tasks.task import Task, is_right


def with_rejected(
    record: Record, samples: Iterable[str], alternatives: Sequence[str], task: Task = SHORT_ANSWER
) -> Record:
    """The record with the first wrong one of the model's `samples` as rejected answer, else one of `alternatives`.

    The alternative is a wrong one drawn by a pure function of the question. Raises UserError if all are right.
    """
    wrong = own_wrong_answer(record, samples, task)
    if wrong is None:
        # The smallest hash wins: adding or reordering alternatives moves as few draws as can be. No more are graded.
        drawn = sorted(filter(str.strip, alternatives), key=lambda text: (unit_hash("rejected", record.id, text), text))
        wrong = next((text for text in drawn if not is_right(task, text, record)), None)
        if wrong is None:
            raise UserError(f"{record.origin or record.question}: no wrong answer to reject was found or given")
    return replace(record, rejected=wrong)


def own_wrong_answer(record: Record, samples: Iterable[str], task: Task = SHORT_ANSWER) -> str | None:
    """First of the model's samples that says something and is wrong, or None."""
    return next((text.strip() for text in samples if text.strip() and not is_right(task, text, record)), None)


def add_rejected(
    records: Sequence[Record], samples: Sequence[Sequence[str]], task: Task = SHORT_ANSWER
) -> tuple[list[Record], int]:
    """Pairs for all records from the model's samples of each, and for how many a fallback had to be used.

    The fallback is another record's answer, of the same strata where there is a wrong one: plausible, not absurd. Where the
    task lists what can be right, it is of that list, and so is what the samples say.
    """
    everywhere = sorted({record.chosen for record in records if record.chosen})
    by_strata: dict[tuple[tuple[str, str], ...], set[str]] = defaultdict(set)
    for record in records:
        if record.chosen:
            by_strata[tuple(sorted(record.strata.items()))].add(record.chosen)
    pairs, fallbacks = [], 0
    for record, own in zip(records, samples, strict=True):
        near = sorted(by_strata[tuple(sorted(record.strata.items()))])
        if choices := task.choices(record):
            own = [one.text for one in (task.read(text.strip(), record) for text in own) if one.found]
            near = list(choices)
        elif all(is_right(task, text, record) for text in near):
            near = everywhere
        fallbacks += own_wrong_answer(record, own, task) is None
        pairs.append(with_rejected(record, own, near, task))
    return pairs, fallbacks


def with_confidence_statements(records: Sequence[Record], *, keep: bool) -> list[Record]:
    """PPO-M's pairs (Leng et al. 2024, arXiv 2410.09724): both answers of a pair, with high against low confidence.

    The chosen answer is preferred with "(confidence: 70%)" to 100%, the rejected one with 0% to 30%; the numbers are a pure
    function of question and answer. `keep` leaves the pair itself in. A record that is no pair stays as it is.
    """
    found = []
    for record in records:
        if not record.chosen or not record.rejected:
            found.append(record)
            continue
        good, bad = (_stating(record, text) for text in (record.chosen, record.rejected))
        found += [record] if keep else []
        found.append(replace(record, chosen=good[0], rejected=good[1]))
        found.append(replace(record, chosen=bad[1], rejected=bad[0]))
    return found


def _stating(record: Record, answer: str) -> tuple[str, str]:
    """The answer with high and with low confidence, as `calibtrain.confidence.stated` reads it."""
    high, low = (10 * int(4 * unit_hash("confidence", side, record.id, answer)) for side in ("high", "low"))
    said = answer.rstrip()
    return f"{said} (confidence: {70 + high}%)", f"{said} (confidence: {low}%)"

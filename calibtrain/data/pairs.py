"""Preference pairs whose rejected answer is the model's own wrong one, and pairs of stated confidences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.short_answer import SHORT_ANSWER
from calibtrain.tasks.task import Task, is_right

FEW = 256
"""Alternatives of which each question looks at all; of more it takes some that its hash draws."""
DRAWS = 32


def with_rejected(
    record: Record, samples: Iterable[str], alternatives: Sequence[str], task: Task = SHORT_ANSWER
) -> Record:
    """The record with the first wrong one of the model's `samples` as rejected answer, else one of `alternatives`.

    The alternative is a wrong one drawn by a pure function of the question and of the alternatives, whose order counts
    where they are more than FEW. Raises UserError if all are right.
    """
    wrong = own_wrong_answer(record, samples, task)
    return _rejecting(record, _drawn_wrong_answer(record, alternatives, task) if wrong is None else wrong)


def own_wrong_answer(record: Record, samples: Iterable[str], task: Task = SHORT_ANSWER) -> str | None:
    """First of the model's samples that says something and is wrong, or None."""
    return next((text.strip() for text in samples if text.strip() and not is_right(task, text, record)), None)


def _rejecting(record: Record, wrong: str | None) -> Record:
    if wrong is None:
        raise UserError(f"{record.origin or record.question}: no wrong answer to reject was found or given")
    return replace(record, rejected=wrong)


def _drawn_wrong_answer(record: Record, alternatives: Sequence[str], task: Task) -> str | None:
    """A wrong one of the alternatives, or None. No more are graded than it takes to find one."""
    own, drawn = record.id, _draws(record.id, alternatives)
    if len(alternatives) <= FEW:
        # The smallest hash wins: adding or reordering alternatives moves as few draws as can be.
        drawn = iter(sorted(alternatives, key=lambda text: (unit_hash("rejected", own, text), text)))
    return next((text for text in drawn if text.strip() and not is_right(task, text, record)), None)


def _draws(own: str, alternatives: Sequence[str]) -> Iterator[str]:
    """Alternatives at places that a question's id draws; then, where hardly any is wrong, each of them once."""
    count = len(alternatives)
    for draw in range(DRAWS):
        yield alternatives[int(unit_hash("rejected", own, draw) * count)]
    start = int(unit_hash("rejected", own, "start") * count)
    for place in range(count):
        yield alternatives[(start + place) % count]


def add_rejected(
    records: Sequence[Record], samples: Sequence[Sequence[str]], task: Task = SHORT_ANSWER
) -> tuple[list[Record], int]:
    """Pairs for all records from the model's samples of each, and for how many a fallback had to be used.

    The fallback is another record's answer, of the same strata where there is a wrong one: plausible, not absurd. Where the
    task lists what can be right, it is of that list, and so is what the samples say.
    """
    by_strata: dict[tuple[tuple[str, str], ...], set[str]] = defaultdict(set)
    for record in records:
        if record.chosen:
            by_strata[_cell(record)].add(record.chosen)
    # Sorted once: doing so for each record would take the square of their number.
    near = {cell: sorted(texts) for cell, texts in by_strata.items()}
    everywhere = sorted(set().union(*by_strata.values()))
    pairs, fallbacks = [], 0
    for record, own in zip(records, samples, strict=True):
        choices = task.choices(record)
        if choices:
            own = [one.text for one in (task.read(text.strip(), record) for text in own) if one.found]
        wrong = own_wrong_answer(record, own, task)
        if wrong is None:
            fallbacks += 1
            for others in (choices,) if choices else (near.get(_cell(record), ()), everywhere):
                wrong = _drawn_wrong_answer(record, others, task) if wrong is None else wrong
        pairs.append(_rejecting(record, wrong))
    return pairs, fallbacks


def _cell(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.strata.items()))


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

"""Records as token sequences that know their role, ready to be collated."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from calibtrain.data.drops import DropReport
from calibtrain.data.lazy import Lazy
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from calibtrain.records import Record

logger = logging.getLogger(__name__)

LOOKED_AT = 20
"""So many records are compared with what the template renders for a whole conversation."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence: prompt ids, then completion ids, which end with the end token."""

    ids: tuple[int, ...]
    completion_start: int
    """Length of the prompt, at least 1: the first completion token needs a hidden state to be predicted from."""
    role: int
    """CHOSEN, REJECTED, ANSWER or QUERY of calibtrain.losses.terms."""
    record_id: int
    """Index of the record in its split."""
    pair_id: int = -1
    """The same for chosen and rejected of a pair; -1 elsewhere."""
    correct: float = math.nan
    """Grade of an own answer, or of the one a QUERY asks about, 0 or 1; NaN elsewhere."""
    reference_logprobs: tuple[float, ...] = ()
    """Log-prob of each completion token under a frozen reference, or empty."""
    answer_span: tuple[int, int] | None = None
    """Completion tokens [start, stop) that are the answer, where it has a reasoning around it; None: all."""

    @property
    def completion_length(self) -> int:
        """Number of completion tokens, with the end token."""
        return len(self.ids) - self.completion_start


def encode_records(
    records: Sequence[Record],
    template: Template,
    max_length: int,
    pairs: bool,
    drops: DropReport,
    *,
    unpaired: bool = False,
) -> list[tuple[Encoded, ...]]:
    """Sequences of each record: (chosen,) or, with `pairs`, (chosen, rejected) with one and the same prompt.

    With `unpaired`, the one answer that a record has, (chosen,) or (rejected,).

    Prompts are cut from the left to fit `max_length` tokens, completions never: a record whose completion leaves no
    room for a prompt is dropped, as is one without the answers it needs. Both are counted in `drops`, and `record_id`
    stays the index in `records`. Raises UserError if nothing is left.
    """
    _tell_departures(records[:LOOKED_AT], template)
    examples = []
    for index, record in enumerate(records):
        example = _encoded(record, index, template, max_length, pairs, drops, unpaired)
        if example is not None:
            examples.append(example)
    if records and not examples:
        raise UserError(
            f"no training record is left: {'; '.join(drops.lines())}. Raise data.max_length or mend the data"
        )
    return examples


def lazy_examples(
    records: Sequence[Record], template: Template, max_length: int, pairs: bool, drops: DropReport, kept: int
) -> Lazy[tuple[Encoded, ...]]:
    """As `encode_records`, each record when it is asked for; the last `kept` stay in memory.

    In the place of a record that would be dropped stands the next one that is not.
    """
    _tell_departures(records[:LOOKED_AT], template)
    unfit: set[int] = set()

    def example(place: int) -> tuple[Encoded, ...]:
        for index in chain(range(place, len(records)), range(place)):
            if index in unfit:
                continue
            found = _encoded(records[index], index, template, max_length, pairs, drops, False)
            if found is not None:
                return found
            unfit.add(index)
        raise UserError(
            f"no training record is left: {'; '.join(drops.lines())}. Raise data.max_length or mend the data"
        )

    return Lazy(len(records), example, kept)


def _encoded(
    record: Record, index: int, template: Template, max_length: int, pairs: bool, drops: DropReport, unpaired: bool
) -> tuple[Encoded, ...] | None:
    """The sequences of one record; None, and why in `drops`, where it cannot serve."""
    roles = (CHOSEN, REJECTED) if pairs else (CHOSEN,)
    if unpaired and record.chosen is None:
        roles = (REJECTED,)
    texts = [record.rejected if role == REJECTED else record.chosen for role in roles]
    place = record.origin or record.question
    if any(text is None or not text.strip() for text in texts):
        drops.drop("no rejected answer" if pairs and record.chosen else "no answer", place)
        return None
    if pairs and record.chosen == record.rejected:
        drops.drop("chosen and rejected are the same answer", place)
        return None
    try:
        completions = [template.completion_ids(text) for text in texts if text]
    except UserError:
        drops.refuse("the tokenizer cannot tell the answer from the prompt", place, record.question)
        return None
    room = max_length - max(map(len, completions))
    if room < 1:
        drops.refuse(f"the answer alone fills max_length {max_length}", place, record.question)
        return None
    try:
        prompt, shortened = fit_prompt(record, template, room)
    except UserError as error:  # the chat template's, or the user's own
        drops.refuse(error, place, record.question)
        return None
    drops.shortened += shortened
    return tuple(
        Encoded((*prompt, *completion), len(prompt), role, index, pair_id=index if pairs else -1)
        for role, completion in zip(roles, completions, strict=True)
    )


def _tell_departures(records: Sequence[Record], template: Template) -> None:
    """Warn once where what is trained is not what the chat template renders; on the first rank."""
    for record in records if os.environ.get("RANK", "0") == "0" else ():
        if found := template.departure(record):
            logger.warning(
                "%s: prompt and completion are not what the chat template renders for the whole conversation: %s; "
                "see data.chat_template_kwargs",
                record.origin or record.question,
                found,
            )
            return


def encode_answer(
    record: Record,
    text: str,
    correct: bool,
    template: Template,
    max_length: int,
    record_id: int,
    role: int = ANSWER,
) -> Encoded | None:
    """The model's own graded answer as a sequence, or what else is said with that grade; None if it leaves no room.

    `text` is all that was said; of an ANSWER the task finds the span that it is graded by. It may be empty (the end token
    alone). Raises UserError if the tokenizer cannot tell it from the prompt.
    """
    completion = template.completion_ids(text)
    room = max_length - len(completion)
    if room < 1:
        return None
    prompt, _ = fit_prompt(record, template, room)
    span = read_reply(template, completion, record).span if role == ANSWER else None
    span = None if span == (0, len(completion)) else span
    return Encoded((*prompt, *completion), len(prompt), role, record_id, correct=float(correct), answer_span=span)


def fit_prompt(record: Record, template: Template, room: int) -> tuple[list[int], bool]:
    """At most `room` ids of a record's prompt, and whether it was cut: first its context from the end, then on the left."""
    fitted = template.fitted(record, room=room)
    prompt = template.prompt_ids(fitted)
    shortened = len(prompt) > room or fitted.context != record.context
    return cut_left(prompt, room, template.tokenizer.bos_token_id), shortened


def cut_left(prompt: Sequence[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` ids of a prompt. Its BOS stays, unless it is a mark that every turn of a chat opens with."""
    prompt = list(prompt)
    if len(prompt) <= room:
        return prompt
    if room > 1 and prompt[0] == bos_id and prompt.count(bos_id) == 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]

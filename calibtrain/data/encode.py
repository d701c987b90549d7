"""Records as token sequences that know their role, ready to be collated."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calibtrain.data.drops import DropReport
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import InseparableError, Template
from calibtrain.data.turns import IGNORED, TokenLabels, fitted, learned_sequences, text_sequence, windows
from calibtrain.errors import UserError
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from calibtrain.records import Record

logger = logging.getLogger(__name__)

INSEPARABLE = "the tokenizer cannot tell the answer from the prompt"
LOOKED_AT = 20
"""So many records are compared with what the template renders for a whole conversation."""
AT_ONCE = 512
"""Records whose texts the tokenizer encodes in one call."""


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
    weight: float = 1.0
    """How much it counts in a loss that weighs sequences."""
    labels: tuple[int, ...] = ()
    """What is learned in the place of each id from completion_start on, IGNORED where nothing is; empty: these ids.

    So several turns of a conversation are learned, and what the user says between them is read alone."""

    @property
    def learned(self) -> list[tuple[int, int]]:
        """(place, id) of each completion token, with the end tokens: the place is that of the id it stands for."""
        labels = self.labels or self.ids[self.completion_start :]
        return [(t, label) for t, label in enumerate(labels, self.completion_start) if label != IGNORED]

    @property
    def completion_length(self) -> int:
        """Number of completion tokens, with the end tokens."""
        return len(self.learned) if self.labels else len(self.ids) - self.completion_start

    @property
    def answer_length(self) -> int:
        """Number of tokens of the last answer, with its end token."""
        place = next((i for i, label in enumerate(reversed(self.labels)) if label == IGNORED), len(self.labels))
        return place if self.labels else self.completion_length


def encode_records(
    records: Sequence[Record],
    template: Template,
    max_length: int,
    pairs: bool,
    drops: DropReport,
    *,
    unpaired: bool = False,
    every_turn: bool = True,
) -> list[tuple[Encoded, ...]]:
    """Sequences of each record: (chosen,) or, with `pairs`, (chosen, rejected) with one and the same prompt.

    With `unpaired`, the one answer that a record has, (chosen,) or (rejected,). With `every_turn`, a conversation teaches
    all its answers: in one sequence, or in several where the template writes earlier turns anew.

    Prompts are cut from the left to fit `max_length` tokens, completions never: a record whose completion leaves no
    room for a prompt is dropped, as is one without the answers it needs. Both are counted in `drops`, and `record_id`
    stays the index in `records`. Raises UserError if nothing is left.
    """
    tell_departures(records, template)
    return list(encode_each(records, template, max_length, pairs, drops, unpaired=unpaired, every_turn=every_turn))


def encode_each(
    records: Sequence[Record],
    template: Template,
    max_length: int,
    pairs: bool,
    drops: DropReport,
    *,
    unpaired: bool = False,
    every_turn: bool = True,
) -> Iterator[tuple[Encoded, ...]]:
    """As `encode_records`, one after the other: of the records only a few are held at once."""
    kept = apart = 0
    roles = (CHOSEN, REJECTED) if pairs or unpaired else (CHOSEN,)
    for start in range(0, len(records), AT_ONCE):
        some = list(records[start : start + AT_ONCE])
        said = [text for record in some for role in roles if (text := _said(record, role))]
        with template.encoded_ahead([record for record in some if record.prompt], said):
            for index, record in enumerate(some, start):
                example = _example(record, index, template, max_length, pairs, drops, unpaired, every_turn)
                if example is not None:
                    kept += 1
                    apart += len(example) > 1 and not pairs and bool(record.prompt)
                    yield example
    if apart and os.environ.get("RANK", "0") == "0":
        logger.info(
            "%d conversations are several sequences each: the template writes their earlier turns anew in a later prompt",
            apart,
        )
    if records and not kept:
        raise UserError(
            f"no training record is left: {'; '.join(drops.lines())}. Raise data.max_length or mend the data"
        )


def _said(record: Record, role: int) -> str | None:
    """An answer that is written as it stands."""
    return record.rejected if role == REJECTED else None if record.calls else record.chosen


class Unusable(Exception):
    """Why a record cannot be learned from; `unfit` where none of its kind could be, whatever the run asks for."""

    def __init__(self, why: UserError | str, *, unfit: bool = False) -> None:
        super().__init__(str(why))
        self.why, self.unfit = why, unfit


def _example(
    record: Record,
    index: int,
    template: Template,
    max_length: int,
    pairs: bool,
    drops: DropReport,
    unpaired: bool,
    every_turn: bool,
) -> tuple[Encoded, ...] | None:
    """The sequences of one record; None, and why in `drops`, where it cannot serve."""
    place = record.origin or record.question
    try:
        if record.weight == 0:
            raise Unusable("weight 0")
        if pairs or unpaired or not ((record.learned and every_turn) or not record.prompt):
            return _answers(record, index, template, max_length, pairs, unpaired, drops)
        return _conversation(record, index, template, max_length, drops)
    except Unusable as reason:
        if reason.unfit:
            drops.refuse(reason.why, place, record.question)
        else:
            drops.drop(str(reason), place)
    except UserError as error:  # the chat template's, or the user's own
        drops.refuse(error, place, record.question)
    return None


def _answers(
    record: Record, index: int, template: Template, max_length: int, pairs: bool, unpaired: bool, drops: DropReport
) -> tuple[Encoded, ...]:
    roles = (CHOSEN, REJECTED) if pairs else (CHOSEN,)
    if unpaired and record.chosen is None:
        roles = (REJECTED,)
    texts = [_text(record, role, template) for role in roles]
    if not all(text.strip() for text in texts):
        raise Unusable("no rejected answer" if pairs and record.chosen else "no answer")
    if not record.prompt:
        raise Unusable("no prompt")
    if pairs and record.chosen == record.rejected:
        raise Unusable("chosen and rejected are the same answer")
    try:
        completions = [template.completion_ids(text, written=bool(record.calls)) for text in texts]
    except InseparableError as error:
        raise Unusable(INSEPARABLE, unfit=True) from error
    room = max_length - max(map(len, completions))
    if room < 1:
        raise Unusable(f"the answer alone fills max_length {max_length}", unfit=True)
    prompt, shortened = fit_prompt(record, template, room)
    drops.shortened += shortened
    return tuple(
        Encoded((*prompt, *completion), len(prompt), role, index, pair_id=index if pairs else -1, weight=record.weight)
        for role, completion in zip(roles, completions, strict=True)
    )


def _text(record: Record, role: int, template: Template) -> str:
    if role == REJECTED:
        return record.rejected or ""
    return template.answer_text(record) if record.chosen is not None else ""


def _conversation(
    record: Record, index: int, template: Template, max_length: int, drops: DropReport
) -> tuple[Encoded, ...]:
    """Every answer of a conversation, or a text that is learned as it stands."""
    if not (record.learned or record.prompt):
        found = windows(text_sequence(record.chosen or "", template), max_length)
    else:
        try:
            found = learned_sequences(record, template)
        except InseparableError as error:
            raise Unusable(INSEPARABLE, unfit=True) from error
    fitting = [fitted(one, max_length, template.tokenizer.bos_token_id) for one in found]
    kept = [one for one in fitting if one is not None]
    if not kept:
        raise Unusable(f"the answer alone fills max_length {max_length}", unfit=True)
    drops.shortened += sum(len(one.ids) > max_length for one in found)
    return tuple(_encoded(one, record.weight, index) for one in kept)


def _encoded(sequence: TokenLabels, weight: float, index: int) -> Encoded:
    start = next(i for i, label in enumerate(sequence.labels) if label != IGNORED)
    ids, labels = tuple(sequence.ids), tuple(sequence.labels[start:])
    return Encoded(ids, start, CHOSEN, index, weight=weight, labels=() if labels == ids[start:] else labels)


def tell_departures(records: Sequence[Record], template: Template) -> None:
    """Warn once where what is trained is not what the chat template renders; of the first records, on the first rank."""
    for record in records[:LOOKED_AT] if os.environ.get("RANK", "0") == "0" else ():
        if template.marks and record.learned:  # learned as it is rendered
            continue
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
    """A graded answer as a sequence, or what else is said with that grade; None if it leaves no room.

    `text` is all that was said; of an ANSWER the task finds the span that it is graded by. It may be empty (the end token
    alone). Raises UserError if the tokenizer cannot tell it from the prompt.
    """
    completion = template.completion_ids(text)
    span = read_reply(template, completion, record).span if role == ANSWER else (0, len(completion))
    return encode_reply(record, completion, span, correct, template, max_length, record_id, role)


def encode_reply(
    record: Record,
    completion: Sequence[int],
    span: tuple[int, int],
    correct: bool,
    template: Template,
    max_length: int,
    record_id: int,
    role: int = ANSWER,
) -> Encoded | None:
    """The same of a reply as it was generated: with its reasoning, and no end token where it was cut."""
    room = max_length - len(completion)
    if room < 1:
        return None
    prompt, _ = fit_prompt(record, template, room)
    answer = None if span == (0, len(completion)) else span
    return Encoded((*prompt, *completion), len(prompt), role, record_id, correct=float(correct), answer_span=answer)


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

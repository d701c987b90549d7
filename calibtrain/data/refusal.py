"""Training data that teaches a model to refuse what it does not know, from its own graded answers (R-Tuning).

Zhang et al. 2024, arXiv 2311.09677. What a model knows changes as it learns: call these again with new answers at every
stage, never keep their result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from calibtrain.data.encode import Encoded, encode_answer, encode_reply
from calibtrain.data.queries import query_record
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.matching import normalize

ARE_YOU_SURE = "Are you sure you accurately answered the question based on your internal knowledge?"
SURE, UNSURE = "I am sure.", "I am unsure."
REFUSALS = (
    "I do not know.",
    "I do not know the answer.",
    "I am not sure.",
    "I cannot say.",
    "I do not know enough to answer this.",
    "My knowledge does not cover this.",
)
"""Ways to refuse that speak of the speaker's knowledge: what the model does not know may well be known."""

Kind = Literal["statement", "refusal"]


def refusal_examples(
    records: Sequence[Record],
    texts: Sequence[str],
    known: Sequence[bool | None],
    template: Template,
    max_length: int,
    kind: Kind = "statement",
    replies: Sequence[Sequence[int]] | None = None,
) -> list[tuple[Encoded, ...]]:
    """CHOSEN sequences, one a record, whose `correct` says whether the model knew the answer; for `refusal`.

    `statement`: after the question and the model's own answer, it learns to say whether it is sure. `refusal`: where it
    knew the answer it learns the one that the data give, or its own; where it did not, one of REFUSALS, drawn by a pure
    function of the question.

    Args:
        records: the questions.
        texts: the model's answers to them, in order.
        known: whether the model knew each: the grade of its answer, or `certain_by_entropy`; None leaves it out.
        template: how questions become tokens.
        max_length: of a sequence; prompts are cut from the left to fit it.
        kind: what is learnt.
        replies: the answers as they were generated, with reasoning and end token; only of answers that `known` graded.

    Raises:
        UserError: nothing is left.
    """
    examples: list[tuple[Encoded, ...]] = []
    for index, (record, said, knew) in enumerate(zip(records, texts, known, strict=True)):
        if knew is None:
            continue
        if kind == "refusal" and knew and record.chosen is None and replies is not None:
            ids = replies[index]  # an accepted answer has no reasoning: to learn it would be to give that up
            one = encode_reply(record, ids, (0, len(ids)), knew, template, max_length, index, CHOSEN)
        else:
            if kind == "statement":
                question, text = query_record(record, said, ARE_YOU_SURE), SURE if knew else UNSURE
            else:
                question, text = record, _right_answer(record, said) if knew else _refusal(record)
            one = encode_answer(question, text, knew, template, max_length, index, CHOSEN)
        if one is not None:
            examples.append((one,))
    if records and not examples:
        raise UserError("no refusal example is left: no answer is graded, or data.max_length leaves no room for any")
    return examples


def certain_by_entropy(samples: Sequence[Sequence[str]], share: float = 0.5) -> list[bool]:
    """Whether each question is among the `share` whose sampled answers vary least, by entropy over distinct answers.

    `samples` holds the answers drawn to each question; those that normalise to the same text are the same. Questions of
    equal entropy stay together, on the side that comes nearer to `share`: their order decides nothing.
    """
    if not samples:
        return []
    entropies = [_entropy(one) for one in samples]
    wanted = share * len(entropies)
    cut = sorted(entropies)[min(len(entropies) - 1, math.floor(wanted))]
    below, up_to = sum(one < cut for one in entropies), sum(one <= cut for one in entropies)
    with_cut = up_to - wanted < wanted - below
    return [one < cut or (with_cut and one == cut) for one in entropies]


def _entropy(texts: Sequence[str]) -> float:
    counts = Counter(normalize(text) for text in texts).values()
    return -math.fsum(n / len(texts) * math.log(n / len(texts)) for n in counts)


def _right_answer(record: Record, said: str) -> str:
    """The gold answer; for a record without one, what the model said, if that was right."""
    gold = record.chosen or next(iter(record.accepted), None)
    return gold if gold is not None else said


def _refusal(record: Record) -> str:
    return REFUSALS[int(unit_hash("refusal", record.id) * len(REFUSALS))]

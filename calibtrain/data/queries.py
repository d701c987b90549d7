"""Questions about the model's own graded answers that one token answers: is it correct, and how sure are you."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibtrain.data.encode import Encoded, encode_answer
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.terms import QUERY
from calibtrain.records import Message, Record

NO_YES = ("i", "ii")
"""Names of the choices no and yes (Kapoor et al. 2024, arXiv 2406.08391)."""

CORRECTNESS = "Is the proposed answer correct?\nChoices:\n({}): no\n({}): yes"
CONFIDENCE = "How sure are you that the proposed answer is correct, from {} (not at all) to {} (certain)?"

LEVELS = tuple("0123456789")
"""Confidences 0, 1/9, ..., 1, each a single token also where a tokenizer splits numbers into digits."""


def choice_ids(template: Template, texts: Sequence[str]) -> tuple[int, ...]:
    """Token id of each text as the model would answer it: what a loss takes as `token_set`.

    Raises UserError unless every text is a single token and all differ. ("10" is two tokens for many tokenizers, and
    begins like "1": its first token would not say which is meant.)
    """
    found = [template.completion_ids(text)[:-1] for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens for this tokenizer; choose answers of one token each")
    first = [ids[0] for ids in found]
    if len(set(first)) != len(first):
        raise UserError(f"two of the answers {list(texts)} are the same token for this tokenizer; choose others")
    return tuple(first)


def query_record(record: Record, answer: str, query: str) -> Record:
    """The conversation in which the model gave `answer` and is then asked `query`."""
    return replace(record, prompt=(*record.prompt, Message("assistant", answer), Message("user", query)))


def correctness_queries(
    records: Sequence[Record],
    texts: Sequence[str],
    correct: Sequence[bool | None],
    template: Template,
    max_length: int,
    choices: tuple[str, str] = NO_YES,
) -> list[Encoded]:
    """QUERY sequences that ask whether each graded answer is correct, with the right choice; for `correctness_query`.

    `texts` and `correct` are the model's answers to `records`, in order, and their grades; ungraded ones are left out, as
    are those that max_length leaves no room for. Raises UserError where a choice is not a single token.
    """
    choice_ids(template, choices)
    query = CORRECTNESS.format(*choices)
    return _queries(records, texts, correct, template, max_length, query, choices)


def confidence_queries(
    records: Sequence[Record],
    texts: Sequence[str],
    correct: Sequence[bool | None],
    template: Template,
    max_length: int,
    levels: Sequence[str] = LEVELS,
) -> list[Encoded]:
    """QUERY sequences that ask how sure the model is of each graded answer; for `tokenized_brier`.

    The completion is the highest level for right answers and the lowest for wrong ones. It only marks the place: the loss
    scores the distribution over all levels. Arguments and errors as in `correctness_queries`.
    """
    choice_ids(template, levels)
    query = CONFIDENCE.format(levels[0], levels[-1])
    return _queries(records, texts, correct, template, max_length, query, (levels[0], levels[-1]))


def _queries(
    records: Sequence[Record],
    texts: Sequence[str],
    correct: Sequence[bool | None],
    template: Template,
    max_length: int,
    query: str,
    no_yes: tuple[str, str],
) -> list[Encoded]:
    queries = []
    for index, (record, text, grade) in enumerate(zip(records, texts, correct, strict=True)):
        if grade is None:
            continue
        asked, choice = query_record(record, text, query), no_yes[int(grade)]
        one = encode_answer(asked, choice, grade, template, max_length, index, QUERY)
        if one is not None:
            queries.append(one)
    return queries

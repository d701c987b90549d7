"""Queries about graded answers: single tokens, the right choice, and batches that a loss reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibtrain.data.collate import collate
from calibtrain.data.queries import (
    LEVELS,
    choice_ids,
    confidence_queries,
    correctness_queries,
    query_record,
)
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.calibration_tuning import CorrectnessQueryLoss
from calibtrain.losses.terms import QUERY
from calibtrain.losses.token_terms import query_tokens
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer

CHOICES = ("n", "y")
RECORDS = [
    Record((Message("user", f"In which country is {city}?"),), chosen="x") for city in ("Lyon", "Osaka", "Perth")
]
TEXTS = ["France", "Kenya", "Australia, I think"]


@pytest.fixture(scope="module")
def chat():
    return Template("chat", tiny_tokenizer())


def test_queries_hold_the_answer_the_question_and_the_right_choice(chat):
    queries = correctness_queries(RECORDS, TEXTS, [True, False, None], chat, 200, CHOICES)
    assert [(one.role, one.record_id, one.correct) for one in queries] == [(QUERY, 0, 1.0), (QUERY, 1, 0.0)]
    no, yes = choice_ids(chat, CHOICES)
    for one, text, choice in zip(queries, TEXTS, (yes, no), strict=False):
        prompt = chat.tokenizer.decode(one.ids[: one.completion_start])
        assert RECORDS[one.record_id].question in prompt
        assert prompt.index(text) < prompt.index("Is the proposed answer correct?\nChoices:\n(n): no\n(y): yes")
        assert one.ids[one.completion_start :] == (choice, chat.end_id)
        assert list(one.ids[: one.completion_start]) == chat.prompt_ids(
            query_record(RECORDS[one.record_id], text, "Is the proposed answer correct?\nChoices:\n(n): no\n(y): yes")
        )


@pytest.mark.parametrize("packing", [None, 400])
def test_a_loss_finds_the_choice_in_padded_and_packed_rows(chat, packing):
    queries = correctness_queries(RECORDS, TEXTS, [True, False, True], chat, 200, CHOICES)
    batch = collate(queries, chat.pad_id, packing_tokens=packing)
    loss = CorrectnessQueryLoss(token_set=choice_ids(chat, CHOICES))
    assert int(loss.counts(batch)["correctness_query"]) == 3
    places = query_tokens(batch, loss.token_set)
    no, yes = choice_ids(chat, CHOICES)
    assert batch.targets[places].tolist() == [yes, no, yes]
    # The hidden state that a loss reads is that of the prompt's last token.
    flat = batch.input_ids.flatten()
    at = batch.target_positions[places]
    assert flat[at].tolist() == [one.ids[one.completion_start - 1] for one in queries]
    assert flat[at + 1].tolist() == [yes, no, yes]


def test_confidence_queries(chat):
    queries = confidence_queries(RECORDS, TEXTS, [True, False, None], chat, 200)
    ids = choice_ids(chat, LEVELS)
    assert len(ids) == len(set(ids)) == 10
    assert [one.ids[one.completion_start] for one in queries] == [ids[9], ids[0]]
    assert "from 0 (not at all) to 9 (certain)?" in chat.tokenizer.decode(queries[0].ids)


def test_numbers_that_split_into_digits_are_refused(chat):
    """Taking the first token of each number, as the public code does, would make 1, 10 and 100 the same confidence."""
    with pytest.raises(UserError, match="'10' is 2 tokens"):
        choice_ids(chat, [str(n) for n in range(11)])
    with pytest.raises(UserError, match="'100' is 3 tokens"):
        confidence_queries(RECORDS, TEXTS, [True] * 3, chat, 200, levels=["0", "100"])
    with pytest.raises(UserError, match="same token"):
        choice_ids(chat, ["n", "n"])


def test_prompts_are_cut_and_answers_without_room_left_out(chat):
    texts = ["yes " * 50] * 3
    queries = correctness_queries(RECORDS, texts, [True] * 3, chat, 40, CHOICES)
    assert {len(one.ids) for one in queries} == {40}
    assert correctness_queries(RECORDS, texts, [True] * 3, chat, 2, CHOICES) == []


def test_reference_logprobs_reach_their_tokens(chat):
    queries = correctness_queries(RECORDS, TEXTS, [True, False, True], chat, 200, CHOICES)
    assert collate(queries, chat.pad_id).reference_logprob is None
    known = [queries[0], replace(queries[1], reference_logprobs=(-0.5, -0.25)), queries[2]]
    found = collate(known, chat.pad_id).reference_logprob
    assert found.isnan().tolist() == [True, True, False, False, True, True]
    assert found[2:4].tolist() == [-0.5, -0.25]
    assert found.dtype == torch.float32
    with pytest.raises(UserError, match="record 1: 1 reference log-probs for 2"):
        collate([replace(queries[1], reference_logprobs=(-0.5,))], chat.pad_id)

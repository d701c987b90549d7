"""Thinking is told apart from the answer, and templates that refuse a conversation say which."""

import logging
import math

import pytest
import torch

from calibtrain.confidence import likelihood
from calibtrain.confidence.generation import Generation
from calibtrain.confidence.likelihood import tokens_of
from calibtrain.config import EvaluationConfig
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_records
from calibtrain.data.pairs import own_wrong_answer
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.matching import grade, without_thinking
from tests.tiny import tiny_tokenizer

OPENS = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
STRICT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(text=None, after="", **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (text or tokenizer.chat_template) + after
    return Template("chat", tokenizer, **options)


def ids(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\n\n</think>\n\n7", "7"),
        ("<think>It may be 6.\nNo.</think>7\nand so on", "7"),
        ("\n<think>\nIt may be", ""),
        ("<think></think>", ""),
        ("7", "7"),
        ("7 <think>", "7 <think>"),
    ],
)
def test_what_is_thought_is_no_part_of_the_answer(kind, said, answer):
    template = Template(kind, tiny_tokenizer())
    assert template.decode_answer([*ids(template, said), template.end_id]) == answer


def test_a_block_that_the_prompt_opens_ends_in_the_answer():
    template = with_template(after="{% if add_generation_prompt %}<think>\n{% endif %}")
    assert template.decode_answer(ids(template, "hm\n</think>\n\n7")) == "7"
    assert template.decode_answer(ids(template, "hm, 7")) == ""
    assert template.answer_start(ids(template, "hm, 7")) is None


def test_tags_that_are_special_tokens_are_seen():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    template = Template("chat", tokenizer)
    assert template.decode_answer(ids(template, "<think>It may be 6.</think>7")) == "7"


def test_a_line_break_in_or_right_after_thinking_ends_no_plain_answer():
    template = Template("plain", tiny_tokenizer())
    for going in ("<think>\n", "<think>\n\n</think>\n", "<think>x</think>\n\n"):
        assert template.goes_on(ids(template, going))
    for ended in ("7\n", "<think>\n</think>\n7\n"):
        assert not template.goes_on(ids(template, ended))
    assert not template.goes_on([*ids(template, "<think>"), template.end_id])


def test_confidence_reads_the_answer_alone():
    template = Template("chat", tiny_tokenizer())
    thought, said = ids(template, "<think>\n\n</think>"), [*ids(template, "7"), template.end_id]
    tokens = (*thought, *said)
    whole = Generation(tokens, tuple(-1.0 for _ in tokens), torch.zeros(len(tokens), 4), True)
    record = Record(prompt=(Message("user", "6 + 1?"),), accepted=("7",))
    span = tokens_of(whole, read_reply(template, whole.tokens, record).read)
    assert list(span.tokens) == said
    assert math.fsum(span.logprobs) == -len(said)
    assert span.hidden.shape == (len(said), 4)
    unclosed = Generation(tuple(thought[:-1]), (-1.0,) * (len(thought) - 1), torch.zeros(len(thought) - 1, 4), False)
    assert read_reply(template, unclosed.tokens, record).span == (0, len(unclosed.tokens))


@pytest.mark.parametrize("kind", ["plain", "chat", "opened"])
def test_an_answer_behind_thinking_is_graded_and_its_confidence_read(kind, monkeypatch):
    opened = with_template(after="{% if add_generation_prompt %}<think>\n{% endif %}")
    template = opened if kind == "opened" else Template(kind, tiny_tokenizer())
    said = "6?</think>\n\n7" if kind == "opened" else " <think>\n\n</think>\n\n7"
    tokens = (*ids(template, said), template.end_id)
    made = Generation(tokens, (-1.0,) * len(tokens), torch.zeros(len(tokens), 4), True)
    monkeypatch.setattr(likelihood, "generate", lambda *arguments, **settings: [[made]])
    record = Record((Message("user", "What is it?"),), accepted=("7",))
    found = likelihood.answer_questions(None, template, [record], EvaluationConfig())
    (answer,) = found.answers
    assert answer.text == "7"
    assert answer.correct
    assert len(answer.token_logprobs) == len(found.features.targets) == len(tokens) - template.answer_start(tokens)
    assert "".join(answer.tokens).strip() == "7"


def test_graded_text_may_stand_behind_thinking():
    assert grade("7", ("<think>\n\n</think>\n\n7",))
    assert grade("<think>6?</think>7", ("7",))
    assert not grade("<think>7", ("7",))
    assert not grade("<think>7</think>", ("7",))
    record = Record((Message("user", "What is it?"),), "<think>\n\n</think>\n\n7")
    assert own_wrong_answer(record, ["7", "", "8"]) == "8"


def test_kwargs_reach_the_template_and_its_hash():
    bare, off = with_template(after=OPENS), with_template(after=OPENS, chat_template_kwargs={"enable_thinking": False})
    record = Record((Message("user", "What is it?"),), "7")
    assert off.prompt_text(record) == bare.prompt_text(record) + "<think>\n\n</think>\n\n"
    assert off.hash != bare.hash
    assert off.decode_answer(ids(off, "7")) == "7"


def test_what_the_template_would_not_render_is_told(caplog):
    writes = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    template = with_template(writes)
    records = [Record((Message("user", "What is it?"),), "7", origin=f"file.jsonl:{row}") for row in (1, 2)]
    with caplog.at_level(logging.WARNING):
        encode_records(records, template, 64, False, DropReport())
        encode_records(records, Template("chat", tiny_tokenizer()), 64, False, DropReport())
    (told,) = caplog.messages
    assert "file.jsonl:1" in told
    assert "<think>" in told
    assert "chat_template_kwargs" in told


def conversation(*roles):
    return Record(tuple(Message(role, f"as {role}") for role in roles), "yes", origin="rows.jsonl:2")


def test_a_refused_system_turn_names_its_row_and_the_remedy():
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: .*System role not supported; set data\.merge_system: true"):
        with_template(STRICT).prompt_text(conversation("system", "user"))
    merged = with_template(STRICT, merge_system=True)
    assert "user\nas system\n\nas user<|im_end|>" in merged.prompt_text(conversation("system", "user"))
    assert merged.hash != with_template(STRICT).hash


def test_two_refused_user_turns_name_their_row():
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: .*Roles must alternate; two turns of one role"):
        with_template(STRICT).prompt_text(conversation("user", "user"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("</think>", ""),
        ("</think>\n\n7", "7"),
        ("</think></think>", ""),
        ("<think>", ""),
        ("</think><think>", ""),
        ("<think>a</think><think>b</think>7", "7"),
        ("7 <think> is text", "7 <think> is text"),
    ],
)
def test_stray_and_repeated_tags_are_no_answer(text, answer):
    assert without_thinking(text).strip() == answer
    record = Record(prompt=(Message("user", "3 + 4?"),), accepted=("7",))
    assert own_wrong_answer(record, [without_thinking(text)]) == (answer if "is text" in answer else None)

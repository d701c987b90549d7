"""The step's answers are shared out over ranks and micro-batches without loss or repetition, by (seed, step) alone."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from calibtrain.confidence import likelihood
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.generation import Generation
from calibtrain.config import AnswerScoreConfig, EvaluationConfig, TrainingConfig
from calibtrain.config_losses import CalibrationAwareConfig
from calibtrain.data.templates import Template
from calibtrain.distributed import World, shard
from calibtrain.records import Message, Record
from calibtrain.training import answer_stream
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.engine import schedule_factor
from tests.tiny import tiny_tokenizer

QUESTIONS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(str(i),)) for i in range(30)]


class Asked:
    """Stands for the Answerer where only its template is read."""

    template = Template("plain", tiny_tokenizer())


def stream(answers_per_step, seed=0):
    config = AnswerScoreConfig(moves="all", answers_per_step=answers_per_step)
    made = AnswerStream([config], Asked(), QUESTIONS, seed, 64)
    made.asked = list(range(20, 0, -1))
    made.texts = [f"about {i}" for i in made.asked]
    made.correct = [i % 3 == 0 for i in made.asked]
    return made


def shares(made, step, ranks, micro_batches):
    worlds = [World(rank, ranks, rank, torch.device("cpu")) for rank in range(ranks)]
    return [made.share(step, number, micro_batches, world) for world in worlds for number in range(micro_batches)]


@pytest.mark.parametrize("answers_per_step", [1, 5, 16, 64])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_shares_partition_the_answers_of_a_step(answers_per_step, ranks, micro_batches):
    made = stream(answers_per_step)
    parts = shares(made, 7, ranks, micro_batches)
    together = [one for part in parts for one in part]
    assert [one.record_id for one in together] == [one.record_id for one in shares(made, 7, 1, 1)[0]]
    assert len({one.record_id for one in together}) == len(together) == min(answers_per_step, 20)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(one.correct == float(one.record_id % 3 == 0) for one in together)


def test_answers_that_are_too_long_are_told_of_once(caplog):
    made = stream(16)
    made.texts = ["word " * 200 for _ in made.texts]
    assert shares(made, 3, 1, 2) == [[], []]
    assert [one.message.split(":")[0] for one in caplog.records] == [
        "an own answer of 1000 characters leaves no room for its question in data.max_length"
    ]


def test_one_by_eight_is_two_by_four():
    made = stream(16)
    assert shares(made, 3, 1, 8) == shares(made, 3, 2, 4)


def test_steps_and_seeds_choose_others():
    chosen = [
        [one.record_id for one in shares(stream(8, seed), step, 1, 1)[0]] for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(one) for one in chosen}) == 3
    assert chosen[0] == [one.record_id for one in shares(stream(8), 0, 1, 1)[0]]


def test_state_survives_json():
    class Policy:
        scale = 0.8

    class Module:
        policy = Policy()

    made, again = stream(8), stream(8)
    made.answerer = again.answerer = type("A", (), {"module": Module(), "template": Asked.template})()
    again.asked, again.texts, again.correct = [], [], []
    again.load_state_dict(made.state_dict())
    assert shares(again, 2, 2, 2) == shares(made, 2, 2, 2)


@pytest.mark.parametrize(("items", "ranks"), [(0, 2), (1, 2), (5, 2), (7, 3), (6, 3)])
def test_shards_are_contiguous_and_even(items, ranks):
    parts = [shard(range(items), World(rank, ranks, rank, torch.device("cpu"))) for rank in range(ranks)]
    assert [one for part in parts for one in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_schedules():
    cosine = [schedule_factor(step, 10, TrainingConfig(warmup_ratio=0.2)) for step in range(10)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(cosine[2:]))
    linear = [schedule_factor(step, 10, TrainingConfig(warmup_ratio=0.0, schedule="linear")) for step in range(10)]
    assert linear == pytest.approx([1.0 - step / 10 for step in range(10)])
    assert schedule_factor(9, 10, TrainingConfig(warmup_ratio=0.0, schedule="constant")) == 1.0


CHAT = tiny_tokenizer()
OPENING = tiny_tokenizer()
OPENING.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("tokenizer", "said", "finished"),
    [
        (CHAT, "<think>6, or 7? 6+1 is 7.</think>\n\n7", True),
        (OPENING, "6, or 7? 6+1 is 7.</think>\n\n7", True),
        (CHAT, "7 because six and", False),
    ],
)
def test_what_enters_the_loss_is_what_was_generated_with_its_reasoning_and_cut_where_it_was(
    monkeypatch, tokenizer, said, finished
):
    template, record = Template("chat", tokenizer), Record((Message("user", "What is 6+1?"),), accepted=("7",))
    tokens = (*tokenizer(said, add_special_tokens=False)["input_ids"], *([template.end_id] if finished else []))
    made = Generation(tokens, (-1.0,) * len(tokens), torch.zeros(len(tokens), 4), finished)
    monkeypatch.setattr(likelihood, "generate", lambda *_, **__: [[made]])
    (reply,) = answered = likelihood.answer_questions(None, template, [record], EvaluationConfig()).replies
    asker = type("A", (), {"module": SimpleNamespace(policy=SimpleNamespace(scale=1.0)), "template": template})()
    stream = AnswerStream([AnswerScoreConfig(moves="all")], asker, [record], 0, 256)
    stream.asked, stream.texts, stream.correct, stream.replies = [0], ["7"], [True], list(answered)
    again = AnswerStream([AnswerScoreConfig(moves="all")], asker, [record], 0, 256)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for one in (stream, again):
        (learned,) = one._sequences(0)
        assert learned.ids == (*template.prompt_ids(record), *tokens)
        assert learned.ids[learned.completion_start :] == tokens
        assert learned.answer_span == (None if reply.span == (0, len(tokens)) else reply.span)
    if "</think>" in said:
        start, stop = learned.answer_span
        assert tokenizer.decode(tokens[start:stop], skip_special_tokens=True).strip() == "7"


def test_answers_are_asked_for_at_scale_1_whatever_was_solved_for(monkeypatch):
    """The targets of calibration_aware are laid beside likelihoods in the loss, which know no scale."""
    asked_at = []

    def share(records):
        asked_at.append(asker.module.policy.scale)
        answers = [Answer(one.id, "", "a", (-1.0,), correct=True) for one in records]
        return SimpleNamespace(answers=answers, replies=None)

    policy = SimpleNamespace(scale=0.5)
    asker = SimpleNamespace(module=SimpleNamespace(policy=policy, penalties=[]), template=Asked.template, share=share)
    monkeypatch.setattr(answer_stream, "gather_lists", lambda one: one)
    made = AnswerStream([AnswerScoreConfig(), CalibrationAwareConfig()], asker, QUESTIONS, 0, 64)
    made.before_step(0)
    assert asked_at == [1.0]
    assert policy.scale == 0.5

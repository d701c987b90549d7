"""The step's answers are shared out over ranks and micro-batches without loss or repetition, by (seed, step) alone."""

from itertools import pairwise

import pytest
import torch

from calibtrain.config import AnswerScoreConfig, TrainingConfig
from calibtrain.data.templates import Template
from calibtrain.distributed import World, shard
from calibtrain.records import Message, Record
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

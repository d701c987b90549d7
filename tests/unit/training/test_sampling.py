"""Who asks for which question of a round does not change what is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibtrain.config import RunConfig
from calibtrain.records import Message, Record
from calibtrain.training.sampling import Sampling
from tests.tiny import write_tiny_model
from tests.unit.training.serving_cases import answerer_of

QUESTIONS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(f"{i}",), origin=f"r{i}") for i in range(6)]


@pytest.fixture(scope="module")
def sampling(tmp_path_factory):
    source = write_tiny_model(tmp_path_factory.mktemp("policy"), initializer_range=0.3)
    config = RunConfig.model_validate(
        {
            "model": {"source": str(source), "dtype": "fp32"},
            "data": {"max_length": 64},
            "objective": {"name": "grpo"},
            "evaluation": {"max_new_tokens": 4, "batch_size": 16},
            "rollouts": {"group_size": 4},
        }
    )
    return Sampling(config, answerer_of(config)[0], QUESTIONS)


@pytest.mark.parametrize("shares", [[4, 2], [2, 2, 2], [1, 5]])
def test_ranks_draw_what_one_process_would(sampling, monkeypatch, shares):
    asked = [5, 0, 3, 3, 1, 2]
    streams = [f"0.{place}" for place in range(len(asked))]
    whole = sampling(asked, 7, streams)
    assert whole[8:12] != whole[12:16]  # a question that is asked twice in a round has answers of its own in each place
    world, found = sampling.answerer.world, []
    for rank, count in enumerate(shares):
        first = sum(shares[:rank])
        answerer = replace(sampling.answerer, world=replace(world, rank=rank, size=1))
        monkeypatch.setattr(sampling, "answerer", answerer)
        found += sampling(asked[first : first + count], 7, streams[first : first + count])
    assert [one.tokens for one in found] == [one.tokens for one in whole]
    assert {one.version for one in found} == {7}


def test_steps_and_seeds_draw_anew(sampling):
    first = [one.tokens for one in sampling([0, 1], 7, "ab")]
    assert [one.tokens for one in sampling([0, 1], 7, "ab")] == first
    assert [one.tokens for one in sampling([0, 1], 8, "ab")] != first
    assert [one.tokens for one in sampling([0, 1], 7, "ba")] != first

"""How the questions of a command are dealt to its processes, and their answers put together."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from calibtrain.calibration.scores import TokenScores
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.pipeline import team as team_module
from calibtrain.pipeline.team import LEAVE_SECONDS, Team, deal, first, joined, merged
from tests.unit.pipeline.conftest import measured


@pytest.mark.parametrize(("count", "ranks"), [(0, 2), (1, 2), (7, 2), (23, 3), (40, 4)])
def test_ranks_get_the_batches_that_one_process_would_make(count, ranks):
    lengths = [(7 * i) % 5 for i in range(count)]
    order = sorted(range(count), key=lambda place: lengths[place])
    dealt = deal(lengths, 4, ranks)
    assert sorted(place for own in dealt for place in own) == list(range(count))
    for rank, own in enumerate(dealt):
        for number in range(0, len(own), 4):
            start = (number // 4 * ranks + rank) * 4
            assert own[number : number + 4] == order[start : start + 4]


def whole(n=23):
    rng = np.random.default_rng(0)
    found = measured(n, 5)
    owner = np.repeat(np.arange(n), rng.integers(0, 4, n))
    tokens = TokenScores(rng.normal(size=(len(owner), 3)), rng.normal(size=(len(owner), 8)), owner)
    return replace(found, tokens=tokens, states=rng.normal(size=(n, 8)).astype(np.float32), told=rng.random(n))


def taken(measurement, places):
    """The answers at `places`, in that order."""
    rows = [np.flatnonzero(measurement.tokens.answer == place) for place in places]
    owner = np.repeat(np.arange(len(places)), [len(one) for one in rows])
    index = np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    tokens = TokenScores(measurement.tokens.table[index], measurement.tokens.hidden[index], owner)
    answers = [measurement.answers[place] for place in places]
    picked = {name: getattr(measurement, name)[list(places)] for name in ("table", "states", "told")}
    return replace(measurement, answers=answers, tokens=tokens, **picked)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_answers_of_all_ranks_are_those_of_one_in_their_order(ranks):
    expected = whole()
    dealt = deal([(7 * i) % 5 for i in range(23)], 4, ranks)
    # A rank without questions has answered one all the same, which is cut off.
    parts = [first(taken(expected, own or [0]), len(own)) for own in dealt]
    found = merged(parts, dealt, 23)
    assert found.answers == expected.answers
    for name in ("table", "states", "told"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("table", "hidden", "answer"):
        np.testing.assert_array_equal(getattr(found.tokens, name), getattr(expected.tokens, name))


@pytest.fixture
def members(monkeypatch):
    """Rank 0 and rank 1 of one team at one store; neither may enter a collective."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: pytest.fail("waits for a rank that is gone"))
    return [Team(World(rank, 2, 0, torch.device("cpu"))) for rank in (0, 1)]


@pytest.mark.parametrize("wait", [lambda team: None, lambda team: team._meet()], ids=["for an order", "for the others"])
def test_when_rank_0_fails_the_others_leave_and_its_own_error_is_told(members, monkeypatch, wait):
    main, other = members
    monkeypatch.setattr(team_module, "start_world", lambda: main.world)
    monkeypatch.setattr(other, "_hear", lambda hear=other._hear: (wait(other), hear())[1])
    with ThreadPoolExecutor() as pool:
        working = pool.submit(other.work)
        began = time.monotonic()
        with pytest.raises(UserError, match="mine"), joined():
            raise UserError("mine")
        assert time.monotonic() - began < LEAVE_SECONDS
        assert working.result(5) is None


@pytest.mark.parametrize("ask", [lambda team: team._tell(None), lambda team: team._meet()])
def test_rank_0_tells_why_another_failed(members, ask):
    main, other = members
    other.failed(UserError("no room on rank 1"))
    with pytest.raises(UserError, match="no room on rank 1"):
        ask(main)
    other.failed(ValueError("a bug"))
    with pytest.raises(RuntimeError, match="ValueError: a bug"):
        ask(main)

"""Losses against a memory bank, and those that read a token set: 1 rank x 8 micro-batches = 2 ranks x 4, at any stage."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed.ranks import forked, run
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.distributed
WAYS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooled")
    write_tiny_model(folder / "model", tied=False)
    script = str(__file__).replace("test_pooled", "pooled_cases")
    for ranks in (1, 2):
        ended = run(forked(ranks, script, str(folder)), folder)
        assert ended.code == 0, ended.output[-6000:]
    return {ranks: torch.load(folder / f"results-{ranks}.pt", weights_only=True) for ranks in (1, 2)}


def error(found, expected):
    """Distance of all tensors together, relative to their length."""
    assert found.keys() == expected.keys()
    distance = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return math.sqrt(distance / sum(one.double().square().sum() for one in expected.values()))


def assert_same_step(found, expected, tolerance):
    assert found["counts"] == expected["counts"]
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-5, abs=1e-6)
    assert error(found["gradients"], expected["gradients"]) < tolerance
    for one, other in zip(found["banks"], expected["banks"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(one[:, 1:], other[:, 1:])  # the same answers in the same order


@pytest.mark.parametrize(("ranks", "stage"), WAYS)
def test_values_gradients_and_banks_do_not_see_the_layout(results, ranks, stage):
    expected = results[1][0]["steps"]
    # Later steps start from weights that already differ by rounding.
    tolerances = (1e-6, 5e-6, 5e-6)
    for found, reference, tolerance in zip(results[ranks][stage]["steps"], expected, tolerances, strict=True):
        assert_same_step(found, reference, tolerance)


@pytest.mark.parametrize(("ranks", "stage"), WAYS)
def test_the_bank_is_in_the_checkpoint(results, ranks, stage):
    found = results[ranks][stage]
    assert_same_step(found["resumed"], found["steps"][-1], 1e-6)


def test_the_cases_say_something(results):
    steps = results[1][0]["steps"]
    names = {"nll", "mmce", "soft_binned_ece", "correctness_query", "tokenized_brier"}
    assert all(set(step["counts"]) == names and min(step["counts"].values()) > 2 for step in steps)
    assert steps[0]["sums"]["mmce"] == steps[0]["sums"]["soft_binned_ece"] == 0.0  # nothing to compare with yet
    assert all(abs(step["sums"][name]) > 1e-3 for step in steps[1:] for name in names)
    assert [len(bank) for bank in steps[-1]["banks"]] == [20, 20]
    assert steps[-1]["banks"][0][:, 0].std() > 0.005

"""The study of what a model knows of its guesses: its questions are kept apart, and its numbers mean what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.confidence.head import HeadInputs
from calibtrain.models.confidence_head import POSITIONS, READINGS

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import knows_when as study
from _graded_store import Graded
from _knows_runs import Job


def graded(n, seed, name, informative=2.0):
    """Answers whose grades the likelihood tells a little, and a direction of every layer's states more."""
    rng = np.random.default_rng(seed)
    logit, hidden = rng.normal(0, 1, n), rng.normal(0, 1, n)
    correct = rng.random(n) < 1 / (1 + np.exp(-logit - informative * hidden))
    table = -np.log1p(np.exp(-logit[:, None] / np.array(TEMPERATURE_GRID)))
    states = rng.normal(0, 1, (n, 8, len(POSITIONS), 12))
    states[:, :, :, 0] += 2 * hidden[:, None, None]
    inputs = HeadInputs(-np.log1p(np.exp(-logit)), rng.normal(size=(n, len(READINGS))), states)
    ids, asked = [f"{name}{i}" for i in range(n)], [f"In which country is the city of {name}{i}?" for i in range(n)]
    return Graded(inputs, correct, table, np.full(n, 2), ids, asked, seconds=n / 100)


@pytest.fixture(scope="module")
def run():
    parts = {name: graded(600, seed, name) for seed, name in enumerate(("temperature", "certification", "test"))}
    facts = {"objective": "orpo", "scale": 0.8}
    return study.Run("repeated", 0, facts, **parts, fuel=graded(520, 9, "fuel"))


def test_the_head_is_seen_to_be_better_and_what_it_took_is_told(run):
    rows = {(row["arm"], row["graded"]): row for row in study.arms(run)}
    assert rows.keys() == {("plain", 0), ("plain + temperature", 0), ("today's term", 0), ("head", 256), ("head", 512)}
    plain, head = rows["plain + temperature", 0], rows["head", 512]
    assert head["low"] > 0.05
    assert head["auroc"] - plain["auroc"] == pytest.approx(head["gain"], abs=0.01)
    assert head["certified_0.2"] > plain["certified_0.2"]
    assert head["answering"] == pytest.approx(5.12)
    assert plain["ece_debiased"] < 0.05 < rows["plain", 0]["ece_debiased"] + 0.05
    summary = study.summary([{**run.named, **row} for row in rows.values()])
    wanted = {"auroc_plain", "auroc_head", "coverage20_plain", "coverage20_head", "accuracy_delta", "ece_head"}
    assert {*wanted, "extra_seconds"} <= summary.keys()
    assert summary["auroc_plain"] == plain["auroc"]


def test_leaks_are_seen(run):
    (clean,) = study.leaks(run)
    assert (clean["shared_by_id"], clean["shared_by_content"]) == (0, 0)
    assert abs(clean["auroc_shuffled"] - 0.5) < 2 * clean["noise"]
    assert clean["broken_of_200_at_0.2"] <= 22  # of 200 at 5 %: 99.9 % of the time at most so many
    sets = {"fuel": run.fuel, "test": run.test}
    assert study.shared(sets) == {"id": 0, "content": 0}
    run.test.questions[3] = "in which country is the city of FÜEL7"  # fuel7's, written otherwise
    assert study.shared(sets) == {"id": 0, "content": 1}
    run.test.ids[5] = "fuel8"
    assert study.shared(sets) == {"id": 1, "content": 1}


def test_a_run_is_known_by_all_that_it_is_asked():
    one = Job("repeated", 0, "work")
    others = [Job("fresh", 0, "work"), Job("repeated", 1, "work"), Job("repeated", 0, "work", fuel=64)]
    others += [Job("repeated", 0, "work", run="out"), Job("repeated", 0, "work", changes=("training.epochs=1",))]
    assert len({job.mark for job in (one, *others)}) == 6

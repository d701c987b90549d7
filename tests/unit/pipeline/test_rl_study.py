"""The study of reinforcement learning: what it runs, what it keeps, and how it reads stated confidences."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.stated import read_statement
from calibtrain.config_file import load_config
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Message, Record
from calibtrain.tasks.short_answer import SHORT_ANSWER

ROOT = Path(__file__).parents[3]


sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import _rl_measures as measures
    import rl_calibration
finally:
    sys.path.pop(0)


@pytest.fixture
def study():
    return rl_calibration


def job(study, name, tmp_path, **changes):
    return study.Job(name, 0, str(tmp_path), 4, (), **changes)


def test_every_arm_is_a_config_and_comes_behind_what_it_needs(study, tmp_path):
    for name, one in study.ARMS.items():
        settings = [re.sub(r"\{(\w+)\}", r"./\1", change) for change in job(study, name, tmp_path).settings]
        config = load_config(one.config, settings)
        assert config.rollouts.confidence != "stated" or one.stated
        order = study.with_needs([name])
        assert order[-1] == name
        assert all(order.index(before) < order.index(name) for before in one.needs)


def test_what_a_run_was_asked_for_is_known_again(study, tmp_path):
    first = job(study, "rl_log", tmp_path)
    assert job(study, "rl_log", tmp_path).mark == first.mark
    for other in (
        replace(first, steps=5),
        replace(first, seed=1),
        replace(first, changes=("training.learning_rate=1e-6",)),
        replace(first, validate=True),
        replace(first, name="rl_accuracy"),
    ):
        assert other.mark != first.mark
    sft = job(study, "sft", tmp_path)
    assert replace(sft, steps=5).mark == sft.mark  # its steps are its own


def test_a_finished_run_is_not_run_again(study, tmp_path, monkeypatch):
    done = job(study, "rl_log", tmp_path)
    done.directory.mkdir()
    ran = []

    def run(argv, **settings):
        ran.append(json.loads(argv[-1])["name"])
        left = {"mark": done.mark, "steps": 4, "seconds": 1.0, "measuring": 1.0}
        (done.directory / "rl_log.json").write_text(json.dumps(left))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    assert "4 steps" in study.start(done)
    assert "done before" in study.start(done)
    study.start(replace(done, steps=5))
    assert ran == ["rl_log", "rl_log"]


def test_a_statement_is_read_apart_from_the_answer_and_its_likelihood(study):
    def said(text, *tokens):
        return Answer("id", "q", text, tuple(p for _, p in tokens), tokens=tuple(t for t, _ in tokens))

    stating = [(" New", -0.1), (" Guinea", -0.2), (" (", -1.0), ("confidence: 70%)", -2.0), ("", -3.0)]
    answers = [said("New Guinea (confidence: 70%)", *stating), said("Peru", (" Peru", -0.5), ("", -0.25))]
    records = [
        Record((Message("user", name),), accepted=(right,)) for name, right in (("q", "New Guinea"), ("p", "Chile"))
    ]
    loaded = SimpleNamespace(template=SimpleNamespace(task=SHORT_ANSWER))
    first, second = measures.stated_answers(loaded, answers, records)
    assert (first["correct"], first["stated"], first["missing"]) == (True, 0.7, False)
    assert first["likelihood"] == pytest.approx(math.exp(-0.3))
    assert (second["correct"], second["stated"], second["missing"]) == (False, 0.5, True)
    assert second["likelihood"] == pytest.approx(math.exp(-0.75))


def test_a_summary_of_a_few_arms_speaks_of_these(study):
    found = study.summary([{"arm": "rl_head", "seed": 0, "head_ece": 0.01, "head_auroc": 0.8}])
    assert found == {"seeds": 1, "ece_head_rl": 0.01, "auroc_head_rl": 0.8}


def test_summary_compares_the_arms_of_one_seed(study):
    def found(arm, seed, accuracy, ece):
        return {"arm": arm, "seed": seed, "accuracy": accuracy, "likelihood_ece": ece, "likelihood_auroc": 0.8}

    rows = [found("rl_accuracy", 0, 0.5, 0.2), found("rl_accuracy", 1, 0.4, 0.4), found("rl_log", 1, 0.5, 0.01)]
    result = study.summary(rows)
    assert result["ece_plain_rl"] == pytest.approx(0.3)
    assert result["ece_plain_rl_sd"] == pytest.approx(0.2 / math.sqrt(2))
    assert result["ece_calibrated_rl"] == 0.01
    assert result["accuracy_delta"] == pytest.approx(0.1)  # of seed 1 alone
    assert "ece_dpo" not in result


def test_statements_that_teach_the_format_say_nothing_and_leave_the_evaluation_questions_alone(study, tmp_path):
    study.stated_data(job(study, "sft_stated", tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "seed-0" / "stated.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == study.SFT_ROWS
    stated = [read_statement(row["completion"]) for row in rows]
    levels = Counter(one.confidence for one in stated)
    assert sorted(levels) == [level / 10 for level in range(11)]
    assert max(levels.values()) < 1.5 * min(levels.values())
    splits = prepare(load_config("sft", [study.SIZES.format(train=study.SFT_ROWS)])).splits
    assert [row["prompt"] for row in rows] == [record.question for record in splits["train"]]
    assert [one.answer for one in stated] == [record.chosen for record in splits["train"]]

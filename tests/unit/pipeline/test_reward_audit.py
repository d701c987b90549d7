"""Reward models are measured before they are used, and the page shows it with how reward and right answers went."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.pipeline.report import render_report
from calibtrain.pipeline.report_rewards import reward_figures
from calibtrain.pipeline.reward_audit import FILE, Answered, audited, measure_reward_models, pairs_of, read_audit
from calibtrain.records import Message, Record
from tests.unit.models.test_reward_scorer import write
from tests.unit.pipeline.test_report import HOSTILE, Page, report
from tests.unit.training.test_rollouts import config, rollouts_of


def record(number):
    return Record(prompt=(Message("user", f"Question {number}?"),), accepted=("yes",), chosen="yes")


def test_an_audit_tells_a_reward_model_that_knows_from_one_that_likes_big_words():
    records = [record(i) for i in range(60)]
    answers = [Answered(one, text, float(text == "yes")) for one in records for text in ("yes", "no")]
    pairs = pairs_of(records, answers)
    assert [(one.right, one.wrong) for one in pairs] == [("yes", "no")] * 60
    draw = torch.Generator().manual_seed(1)

    def knows(replies):
        """Margins with a logistic noise: a Bradley-Terry model of scale 1 whose right answers are 1.5 better."""
        noise = torch.rand(len(replies), generator=draw, dtype=torch.float64).logit()
        return torch.tensor([1.5 * one.text.startswith("yes") for one in replies], dtype=torch.float64) + noise

    numbers = audited(pairs, answers, knows)
    assert numbers["ranked_low"] > 0.5
    assert numbers["auroc"] > 0.6
    assert numbers["scale"] > 0
    assert abs(numbers["ece_debiased"]) < 0.1
    assert not numbers["doubts"]

    def likes(replies):
        return torch.tensor([0.01 * len(one.text) + ("90%" in one.text) for one in replies], dtype=torch.float64)

    numbers = audited(pairs, answers, likes)
    assert numbers["prefers_high_right"] == numbers["prefers_high_wrong"] == 1.0
    assert numbers["scale"] is None  # all pairs ranked right, by length
    assert numbers["doubts"]
    assert any("whatever the answer" in line for line in numbers["doubts"])
    assert audited([], [], knows)["doubts"]
    json.dumps(numbers, allow_nan=False)


def test_the_fitted_scale_makes_margins_probabilities():
    """Margins of which sigmoid(3 d) are ranked right."""
    draw = torch.Generator().manual_seed(0)
    size = torch.randn(2000, generator=draw, dtype=torch.float64).abs()
    ranked = torch.rand(2000, generator=draw, dtype=torch.float64) < torch.sigmoid(3.0 * size)
    margin = torch.where(ranked, size, -size)
    scores = torch.stack([margin, torch.zeros_like(margin)], 1).flatten()
    pairs = pairs_of([replace(record(i), rejected="no") for i in range(2000)], [])
    numbers = audited(pairs, [], lambda replies: torch.cat([scores, torch.zeros(8000, dtype=torch.float64)]))
    assert numbers["scale"] == pytest.approx(3.0, rel=0.1)
    assert abs(numbers["ece_debiased"]) < 0.01
    assert numbers["unscaled_ece_debiased"] > 0.1
    assert numbers["ranked_right"] == int(ranked.sum())


def test_pairs_of_the_data_come_before_the_policys_own():
    given = replace(record(0), rejected="perhaps")
    assert pairs_of([given], [Answered(given, "no (confidence: 70%)", 0.0)])[0].wrong == "perhaps"
    assert pairs_of([record(1)], [Answered(record(1), "no (confidence: 70%)", 0.0)])[0].wrong == "no"
    assert pairs_of([record(2)], []) == []


def test_every_reward_model_of_a_run_is_measured_on_held_out_questions(tmp_path, caplog, monkeypatch):
    """Half of all replies count as right; the policy is left as it was, and the loop draws what it would have drawn."""
    monkeypatch.setattr("calibtrain.tasks.short_answer.grade", lambda text, accepted, method: len(text) % 2 == 0)
    one = {"kind": "model", "path": str(write(tmp_path / "one"))}
    run = config("rloo", rollouts={"group_size": 4, "sources": [one, {"kind": "grade"}, {**one, "weight": 2.0}]})
    rollouts, model = rollouts_of(run)
    model.train()
    questions = [record(i) for i in range(10)]
    caplog.set_level("INFO", "calibtrain")
    measure_reward_models(rollouts, questions, tmp_path / "out")
    assert model.training
    first, second = read_audit(tmp_path / "out" / FILE)
    assert (first["name"], second["name"]) == ("model_1", "model_2")
    assert {**first, "name": ""} == {**second, "name": ""}
    assert first["answers"] == 40
    assert 0 < first["pairs"] <= 10
    assert 0 <= first["auroc"] <= 1
    assert "by its chat template" in first["reads"]
    assert "held-out pairs" in caplog.text
    rollouts.before_step(0)
    plain, _ = rollouts_of(run)
    plain.before_step(0)
    assert plain.samples == rollouts.samples
    nothing, _ = rollouts_of(config("rloo", rollouts={"reward": "accuracy"}))
    measure_reward_models(nothing, questions, tmp_path / "none")
    assert read_audit(tmp_path / "none" / FILE) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"models": [{}]}', '{"models": 1}', '{"models": [{"path": 1}]}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="not a measurement of reward models"):
        read_audit(tmp_path / FILE)


LINES = [
    {"event": "log", "step": i, "train/rollouts/proxy": 0.5 * i - 1, "train/rollouts/correct": 0.6 - 0.05 * i}
    | {"train/rollouts/kl": 0.2 * i}
    for i in range(1, 6)
]


def test_figures_show_the_proxy_beside_the_grades_by_step_and_by_kl():
    assert [title for title, _ in reward_figures(LINES)] == [
        "What the answers earn, by step",
        "What the answers earn, by KL",
        "Right answers among those sampled, by step",
        "Right answers among those sampled, by KL",
    ]
    without = [
        {key: value for key, value in line.items() if "kl" not in key and "correct" not in key} for line in LINES
    ]
    assert len(reward_figures(without)) == 1
    assert len(reward_figures([{**line, "train/rollouts/proxy": 0.0} for line in LINES])) == 4  # a judge never pleased
    assert reward_figures(LINES[:1]) == []
    assert reward_figures([{"event": "log", "step": 1, "train/rollouts/correct": 0.5}] * 3) == []


def test_the_page_shows_what_rewarded_the_answers():
    questions = [record(i) for i in range(6)]
    pairs = pairs_of(questions, [Answered(one, "no", 0.0) for one in questions])
    numbers = audited(pairs, [], lambda replies: torch.arange(len(replies), dtype=torch.float64))
    page = Page(render_report(report(reward_models=[{"path": HOSTILE, "reads": HOSTILE, **numbers}], training=LINES)))
    assert "What rewarded the answers" in page.text
    assert "not clearly better than chance" in page.text
    assert "the policy pleases what rewards it" in page.text
    assert not any("alert(1)" in script for script in page.scripts)
    assert "What rewarded the answers" not in render_report(report())

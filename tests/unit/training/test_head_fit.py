"""What a confidence head asks of a run: fitting configs, its own learning rate, and questions that no step learnt from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import Answered
from calibtrain.config import RunConfig
from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.confidence_head import READINGS, ConfidenceHead
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.models.reward import ValueLossModel
from calibtrain.pipeline.check import _check_head
from calibtrain.pipeline.train import with_confidence_head
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of
from calibtrain.training.engine import optimizer_groups
from calibtrain.training.head_fit import HeadFit, askable, fresh_questions, unasked
from calibtrain.training.losses import term_names
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_model

ALONE = World(0, 1, 0, torch.device("cpu"))


def config(objective="sft", **sections):
    return RunConfig.model_validate({"objective": {"name": objective}, **sections})


def records(n):
    return [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(f"{i}",), origin=f"r{i}") for i in range(n)]


def test_unasked_questions_are_those_that_no_step_takes():
    asked = records(20)
    twice = [*asked, asked[3]]  # the same question once more
    for steps in (0, 1, 3):
        taken = {index for step in range(steps) for index in step_indices(step, 4, 21, seed=7)}
        found = unasked(twice, steps, 4, seed=7)
        told = {twice[index].id for index in taken}
        assert {one.id for one in found} == {one.id for one in twice} - told
    assert unasked(asked, 5, 4, seed=0) == []
    accuracy = {"reward": "accuracy"}
    known = config("grpo", rollouts=accuracy)
    assert fresh_questions(known, twice, 3, 4) == unasked(twice, 3, 4, known.seed) != []
    asks_others = config("grpo", rollouts={**accuracy, "dynamic_sampling": 1})
    assert fresh_questions(asks_others, twice, 3, 4) == []  # whichever questions it asks in the place of others


def test_a_question_that_was_learnt_in_other_words_around_it_is_not_unasked():
    [taken] = step_indices(0, 1, 3, seed=0)
    turns = Message("user", "What is 1?"), Message("assistant", "1"), Message("user", "And the next?")
    conversation = Record(prompt=turns, chosen="2", accepted=("2",), learned=(-3, -1))
    alone = records(2)[1]
    under_a_system = Record(prompt=(Message("system", "Be brief."), *alone.prompt), accepted=("1",))
    other = records(9)[8]
    for learnt in (conversation, alone):
        left = [under_a_system, other]
        left.insert(taken, learnt)
        assert unasked(left, 1, 1, seed=0) == [other]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": "grpo", "rollouts": {"confidence": "head"}}, "add a section confidence_head"),
        ({"objective": "grpo", "rollouts": {"confidence": "head", "reward": "ternary"}, "confidence_head": {}},
         "head is scored by reward: brier or log"),
        ({"objective": "grpo", "rollouts": {"confidence": "head", "accuracy_weight": 0}, "confidence_head": {}},
         "would train the head alone"),
        ({"objective": "grpo", "rollouts": {"confidence": "head"}, "confidence_head": {"weight": 3}},
         r"confidence_head.weight: rollouts.confidence: head takes rollouts.score_weight \(1.0\)"),
        ({"objective": "grpo", "rollouts": {"confidence": "head", "reward": "log"}, "confidence_head": {"score": "brier"}},
         "takes rollouts.reward"),
        ({"objective": "reward_model", "confidence_head": {}, "data": {"splits": {"calibration": 0}}},
         "leave out confidence_head"),
        ({"confidence_head": {"trains_backbone": True}}, "by heart"),
        ({"confidence_head": {}, "data": {"splits": {"calibration": 0}}}, "confidence_head needs questions"),
        ({"confidence_head": {"layers": []}}, "at least 1"),
        ({"confidence_head": {"refresh_every": 7}, "penalties": [{"name": "answer_score"}]},
         "refresh_every must be the same"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        config(sections.pop("objective", "sft"), **sections)


def test_what_the_score_in_the_loss_is():
    plain = config("grpo", confidence_head={"score": "brier", "weight": 0.3}, rollouts={"reward": "accuracy"})
    assert plain.head_score == ("brier", 0.3)
    assert plain.penalties_in_loss == []
    paid = config("grpo", confidence_head={}, rollouts={"reward": "log", "confidence": "head", "score_weight": 0.5})
    assert paid.head_score == ("log", 0.5)
    assert paid.penalties_in_loss == []  # the likelihood is not scored beside it
    assert paid.rollouts.reward_of_right == 1.0
    assert not paid.rollouts.rewards_nothing
    beside = config("grpo", confidence_head={}, rollouts={"reward": "log"})
    assert [one.name for one in beside.penalties_in_loss] == ["answer_score"]
    assert term_names(beside) == ["answer_score", "confidence_head", *[n for n in term_names(beside) if n == "policy"]]


@pytest.mark.parametrize("kind", [LossModel, ValueLossModel])
def test_the_head_has_a_rate_of_its_own_and_stands_beside_a_value_head(kind):
    run = config(confidence_head={"learning_rate": 3e-3}, training={"learning_rate": 1e-5, "weight_decay": 0.1})
    model = with_confidence_head(kind(Policy(tiny_model(layers=4)), None), run)
    assert model.confidence_head.layers == (1, 2, 3, 4)
    groups = optimizer_groups(model, run)
    assert [group["lr"] for group in groups] == [1e-5, 1e-5, 3e-3, 3e-3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0]
    of_head = {id(one) for group in groups[2:] for one in group["params"]}
    assert of_head == {id(one) for one in model.confidence_head.parameters()}
    together = [one for group in groups for one in group["params"]]
    assert len(together) == len({id(one) for one in together}) == len([*model.parameters()])
    assert isinstance(model.confidence_head, ConfidenceHead)
    assert with_confidence_head(kind(Policy(tiny_model()), None), config()).confidence_head is None


def test_with_no_weight_nothing_is_answered_for_it_along_the_run():
    run = config(confidence_head={"weight": 0}, data={"splits": {"calibration": 0}})
    assert not run.trains_head
    assert run.penalties_on_answers == []
    assert "confidence_head" not in term_names(run)
    assert with_confidence_head(LossModel(Policy(tiny_model())), run).confidence_head is None
    in_loss = config("grpo", confidence_head={}, rollouts={"reward": "log", "confidence": "head"})
    assert in_loss.trains_head  # rollouts.score_weight is its weight there


def test_then_it_is_solved_for_at_the_end_or_there_is_none(caplog):
    rng = np.random.default_rng(0)

    def answered(asked, layers):
        states = torch.from_numpy(rng.normal(size=(len(asked), len(layers), 3, 8))).float()
        right = [bool(one) for one in states[:, 0, 0, 0] > 0]
        answers = [Answer(one.id, "?", "a", (-0.5,), y) for one, y in zip(asked, right, strict=True)]
        return Answered(answers, None, states=states, readings=torch.zeros(len(asked), len(READINGS)))

    engine = SimpleNamespace(module=SimpleNamespace(confidence_head=None))
    head, told = HeadFit(engine, answered, records(400), (1, 2), 0, ALONE).solve()
    assert (head.how, head.n, head.layers) == ("solved", 400, (1, 2))
    assert head.gain > 2
    assert told["calib/calibration/head/auroc"] > 0.7
    assert HeadFit(engine, answered, records(9), (1, 2), 0, ALONE).solve() == (None, {})
    assert "the run has none" in caplog.text
    assert HeadFit(engine, answered, [], (1, 2), 0, ALONE).solve() == (None, {})


def test_a_question_that_cannot_be_asked_does_not_end_the_run():
    good = records(5)
    bad = [replace(good[0], accepted=()), replace(good[1], tools=({"name": "f"},))]
    template = Template("plain", tiny_tokenizer())
    with pytest.raises(UserError):
        template.prompt_ids(bad[1])
    assert askable([*bad, *good], template, 3) == good[:3]
    assert askable(iter(good), template, 9) == good


def test_layers_and_tasks_that_it_cannot_read_are_told_before_training(tmp_path):
    source = {"source": str(write_tiny_model(tmp_path / "tiny"))}
    template = Template("plain", tiny_tokenizer())
    _check_head(config(model=source, confidence_head={"layers": [0, 2]}), template, records(1))
    for layers in ([3], [1, 1]):
        with pytest.raises(UserError, match=r"from 0 \(embeddings\) to 2"):
            _check_head(config(model=source, confidence_head={"layers": layers}), template, records(1))
    run = config(model=source, confidence_head={}, task={"kind": "choice", "answer_by": "likelihood"})
    asked = [Record(prompt=(Message("user", "Which?"),), accepted=("a",), options=("a", "b"))]
    with pytest.raises(UserError, match="answer_by: generation"):
        _check_head(run, Template("plain", tiny_tokenizer(), task=task_of(run.task)), asked)

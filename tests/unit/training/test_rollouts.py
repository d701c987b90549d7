"""Rollouts: what sampled answers earn, which token is credited, and a policy that learns from it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses import build_loss
from calibtrain.losses.terms import mean_loss
from calibtrain.models.loss_model import LogprobStep, LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.models.reward import ValueLossModel
from calibtrain.records import Message, Record
from calibtrain.tasks.task import Reading
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.rollout_credit import credit
from calibtrain.training.rollout_rewards import check_rewards
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.samples import Sample
from tests.tiny import tiny_model, tiny_tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))


def config(objective="grpo", training=None, **sections):
    options = {"name": objective} if isinstance(objective, str) else objective
    return RunConfig.model_validate(
        {
            "model": {"dtype": "fp32"},
            "data": {"max_length": 64},
            "objective": options,
            "evaluation": {"max_new_tokens": 3},
            "training": {"micro_batch_size": 2, "global_batch_size": 4, **(training or {})},
            **sections,
        }
    )


def samples(*rows):
    """(question, tokens, correct, confidence) each."""
    return [Sample(q, tuple(range(n)), float(c), conf, stated=(False,) * (n - 1) + (True,)) for q, n, c, conf in rows]


FOUR = samples((0, 2, 1, 0.9), (0, 3, 0, 0.6), (0, 1, 0, 0.1), (0, 2, 1, 0.5))
GROUP = [0, 0, 0, 0]


def brier(correct, confidence):
    return correct - (confidence - correct) ** 2


def test_grpo_credit_is_the_reward_less_its_groups_mean():
    found, means = credit(FOUR, GROUP, config(rollouts={"group_size": 4, "confidence": "stated", "decoupled": False}))
    rewards = [brier(one.correct, one.confidence) for one in FOUR]
    mean = sum(rewards) / 4
    for one, reward, parts in zip(FOUR, rewards, found, strict=True):
        assert parts.advantages == pytest.approx([reward - mean] * len(one.tokens))
    assert means["reward"] == pytest.approx(mean)
    assert means["correct"] == 0.5
    assert means["tokens"] == 2.0


def test_rloo_pays_for_the_kl_in_the_reward():
    given = [replace(one, logprobs=(-1.0,) * len(one.tokens), reference=(-1.5,) * len(one.tokens)) for one in FOUR]
    objective = {"name": "rloo", "beta": 0.2}
    found, means = credit(given, GROUP, config(objective, rollouts={"reward": "accuracy"}))
    rewards = [one.correct - 0.2 * 0.5 * len(one.tokens) for one in given]
    for one, reward, parts in zip(given, rewards, found, strict=True):
        assert parts.advantages == pytest.approx([reward - (sum(rewards) - reward) / 3] * len(one.tokens))
    assert means["kl"] == pytest.approx(0.5 * 2)


def test_ppo_credits_tokens_through_its_values():
    given = [
        replace(
            one,
            values=(0.25,) * len(one.tokens),
            logprobs=(-1.0,) * len(one.tokens),
            reference=(-1.5,) * len(one.tokens),
        )
        for one in FOUR
    ]
    objective = {"name": "ppo", "beta": 0.1, "lam": 1.0}
    found, _ = credit(given, GROUP, config(objective, rollouts={"reward": "accuracy"}))
    for one, parts in zip(given, found, strict=True):
        n = len(one.tokens)
        assert parts.returns == pytest.approx([one.correct - 0.05 * (n - t) for t in range(n)])
    flat = torch.tensor([a for parts in found for a in parts.advantages])
    assert flat.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert flat.std().item() == pytest.approx(1.0, abs=1e-4)


def test_stated_confidence_has_its_own_credit_and_silence_the_least():
    rows = samples((0, 2, 1, 0.9), (0, 3, 0, 0.9), (0, 2, 1, math.nan), (0, 2, 0, 0.1))
    rollouts = {"confidence": "stated"}
    found, means = credit(rows, GROUP, config(rollouts=rollouts))
    answers = [parts.advantages[0] for parts in found]
    assert answers == pytest.approx([0.5, -0.5, 0.5, -0.5])
    confidences = [parts.advantages[-1] for parts in found]
    scores = [-0.01, -0.81, -1.5, -0.01]
    assert confidences == pytest.approx([s - sum(scores) / 4 for s in scores])
    assert means["confidence_missing"] == 0.25
    together, _ = credit(rows, GROUP, config(rollouts={**rollouts, "decoupled": False}))
    assert min(range(4), key=lambda i: together[i].advantages[0]) == 2


def test_ternary_reward_prices_wrong_answers_by_the_target_risk():
    rows = samples((0, 1, 1, 0.5), (0, 1, 0, 0.5), (0, 1, 0, 0.5))
    rows[2] = replace(rows[2], abstained=True)
    _, means = credit(rows, [0, 0, 0], config(rollouts={"reward": "ternary"}, abstention={"target_risk": 0.25}))
    assert means["reward"] == pytest.approx((1 - 3 + 0) / 3)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_likelihood_earns_nothing_by_its_score(objective, beta):
    """No credit depends on it; without a weight on accuracy there is none at all, but what pays for the KL."""
    given = [replace(one, values=(0.25,) * len(one.tokens)) for one in FOUR]
    if beta:
        given = [replace(one, logprobs=(-1.0,) * len(one.tokens), reference=(-1.5,) * len(one.tokens)) for one in given]
    for reward, weight in (("brier", None), ("log", None), ("brier", 0.5)):
        run = config({"name": objective, "beta": beta}, rollouts={"reward": reward, "accuracy_weight": weight})
        found, means = credit(given, GROUP, run)
        other = [replace(one, confidence=1.0 - one.confidence) for one in given]
        assert credit(other, GROUP, run)[0] == found
        nothing = weight is None and (not beta or objective == "grpo")
        assert all(value == 0.0 for one in found for value in one.advantages) == nothing
        assert means["alike"] == 0.0  # every graded answer teaches
        assert means["reward"] == (0.0 if weight is None else pytest.approx(0.25))


STATED = {"confidence": "stated"}


@pytest.mark.parametrize(
    ("objective", "rollouts", "message"),
    [
        ("rloo", {**STATED, "decoupled": False, "score_weight": 2.0}, "accuracy_weight"),
        ("ppo", {**STATED, "decoupled": False, "reward": "log"}, r"at least 6\.907"),
        ("grpo", {**STATED, "format_penalty": -0.5}, "format penalty"),
        ("grpo", {"score_weight": 0.0}, "both 0"),
        ({"name": "grpo", "scale_advantages": "group"}, {**STATED, "decoupled": False}, "ends at certainty"),
    ],
)
def test_rewards_that_teach_something_else_are_errors(objective, rollouts, message):
    with pytest.raises(UserError, match=message):
        check_rewards(config(objective, rollouts=rollouts))


@pytest.mark.parametrize("rollouts", [{}, {"reward": "log"}, {"score_weight": 2.0}, {**STATED, "score_weight": 9.0}])
def test_rewards_that_are_honest_are_not(rollouts):
    check_rewards(config(rollouts=rollouts))


def test_configs_that_do_not_fit_are_refused():
    for changes, message in (
        ({"objective": "rloo", "rollouts": {"confidence": "stated"}}, "decoupled"),
        ({"rollouts": {"confidence": "stated", "reward": "accuracy"}}, "stated is scored"),
        ({"penalties": [{"name": "mmce"}]}, "its own answers"),
        ({"rollouts": STATED, "penalties": [{"name": "answer_score", "moves": "all"}]}, "scores a likelihood"),
        ({"objective": {"name": "grpo", "norm": "constant"}}, "length"),
        ({"objective": "reward_model", "penalties": [{"name": "answer_score"}]}, "scalar head"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)


# A whole policy


QUESTIONS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(f"{i}",), origin=f"r{i}") for i in range(4)]


def rollouts_of(run, module_class=LossModel, questions=QUESTIONS, reference=None, seed=0):
    torch.manual_seed(seed)
    template = Template("plain", tiny_tokenizer())
    penalties = [build_loss(one) for one in run.penalties_in_loss]
    model = module_class(Policy(tiny_model(len(template.tokenizer), seed=seed)), build_loss(run.objective), penalties)
    answerer = Answerer(model, template, run.evaluation, WORLD)
    plan = BatchPlan(run.training.micro_batch_size, 2, 1)
    return Rollouts(run, answerer, questions, plan, reference), model


def batch_of(rollouts, indices=(0, 1, 2, 3), shared=False):
    sequences = [sequence for index in indices for sequence in rollouts[index]]
    return rollouts.fill(collate(sequences, rollouts.answerer.template.pad_id, shared_prefix=shared), indices)


def test_a_round_is_a_function_of_seed_and_step():
    run = config(rollouts={"group_size": 3})
    (first, _), (second, _) = rollouts_of(run), rollouts_of(run)
    first.before_step(5)
    second.before_step(2)
    second.before_step(5)
    assert first.samples == second.samples
    second.before_step(6)
    assert first.samples != second.samples
    assert {len(first[index]) for index in range(4)} == {3}
    assert len(first) == 4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_batches_hold_each_tokens_own_numbers(objective, shared):
    """Old log-probs are the policy's, so that every ratio is 1 until it moves; the reference's are the reference's."""
    run = config({"name": objective, "beta": 0.1}, rollouts={"group_size": 3, "steps_per_round": 2})
    reference = LossModel(Policy(tiny_model(400, seed=9))).eval()
    rollouts, model = rollouts_of(run, ValueLossModel if objective == "ppo" else LossModel, reference=reference)
    rollouts.before_step(0)
    batch = batch_of(rollouts, (2, 0), shared)
    model.eval()
    logprob, values = model(LogprobStep(batch))
    torch.testing.assert_close(batch.old_logprob, logprob, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.reference_logprob, reference(LogprobStep(batch))[0], rtol=1e-4, atol=1e-5)
    assert batch.advantages.shape == logprob.shape
    if objective == "ppo":
        torch.testing.assert_close(batch.old_values, values, rtol=1e-4, atol=1e-5)
        assert batch.returns.shape == values.shape
    before = rollouts.samples
    rollouts.before_step(1)  # the second step of the round
    assert rollouts.samples is before
    rollouts.before_step(2)
    assert rollouts.samples is not before


def test_the_loss_scores_the_likelihood_that_was_sampled_behind_any_reasoning(monkeypatch):
    monkeypatch.setattr(Template, "answer_start", lambda self, ids: 1 if len(ids) > 1 else 0)
    rollouts, model = rollouts_of(config(rollouts={"group_size": 3}))
    rollouts.before_step(0)
    batch = batch_of(rollouts)
    read = torch.tensor([t >= one.answer_start for one in rollouts.samples for t in range(len(one.tokens))])
    assert not read.all()
    model.eval()
    loss, output = model(TrainStep(batch, {name: count.float() for name, count in model.counts(batch).items()}))
    scores = [(one.confidence - one.correct) ** 2 for one in rollouts.samples]
    assert loss.item() == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert output.terms["answer_score"].count == len(scores)


def test_words_behind_the_answer_are_not_its_likelihood(monkeypatch):
    def read(self, reply, record):
        return Reading(reply[:1], 0, 1) if reply else Reading("", 0, 0, found=False)

    monkeypatch.setattr("calibtrain.tasks.short_answer.ShortAnswer.read", read)
    penalties = [{"name": "answer_score", "moves": "all", "score": "brier"}]
    rollouts, model = rollouts_of(config(rollouts={"group_size": 3}, penalties=penalties))
    rollouts.before_step(0)
    batch = batch_of(rollouts)
    assert any(one.answer_stop is not None for one in rollouts.samples)
    sizes = [sum(batch.is_answer[batch.sequence_ids == i].tolist()) for i in range(len(rollouts.samples))]
    stops = [len(one.tokens) if one.answer_stop is None else one.answer_stop for one in rollouts.samples]
    assert sorted(sizes) == sorted(b - one.answer_start for b, one in zip(stops, rollouts.samples, strict=True))
    model.eval()
    loss, _ = model(TrainStep(batch, {name: count.float() for name, count in model.counts(batch).items()}))
    scores = [(one.confidence - one.correct) ** 2 for one in rollouts.samples]
    assert loss.item() == pytest.approx(sum(scores) / len(scores), rel=1e-4)


def test_an_abstention_has_no_likelihood_to_score(monkeypatch):
    monkeypatch.setattr(
        "calibtrain.tasks.short_answer.ShortAnswer.key",
        lambda self, text, record: "none" if len(text) % 2 == 0 or text == "I don't know" else text,
    )
    penalties = [{"name": "answer_score", "moves": "all"}]
    rollouts, model = rollouts_of(config(rollouts={"group_size": 6, "reward": "ternary"}, penalties=penalties))
    rollouts.before_step(0)
    abstained = sum(one.abstained for one in rollouts.samples)
    assert 0 < abstained < len(rollouts.samples)
    assert model.counts(batch_of(rollouts))["answer_score"] == len(rollouts.samples) - abstained


def test_a_round_survives_a_checkpoint():
    import json

    run = config("ppo", rollouts={"group_size": 2, "steps_per_round": 3})
    rollouts, _ = rollouts_of(run, ValueLossModel)
    rollouts.before_step(0)
    other, _ = rollouts_of(run, ValueLossModel)
    other.load_state_dict(json.loads(json.dumps(rollouts.state_dict())))
    for name in ("advantages", "old_logprob", "old_values", "returns", "targets"):
        assert getattr(batch_of(other), name).equal(getattr(batch_of(rollouts), name))
    assert other.metrics == rollouts.metrics
    fresh, _ = rollouts_of(config(rollouts={"group_size": 2}))
    fresh.before_step(0)
    assert fresh.state_dict() == {"samples": []}  # the next step draws its own


def test_sampling_leaves_the_model_as_it_was():
    run = config(rollouts={"group_size": 2})
    rollouts, model = rollouts_of(run)
    model.train()
    model.policy.scale = 0.5
    rollouts.before_step(0)
    assert model.training
    assert model.policy.scale == 0.5
    plain, other = rollouts_of(run)
    other.policy.scale = 1.0
    plain.before_step(0)
    assert plain.samples == rollouts.samples  # drawn from the policy that is trained, not from the scaled one


def test_questions_without_answers_and_without_room_are_errors():
    bare = [Record(prompt=(Message("user", "Why?"),), chosen="Because")]
    with pytest.raises(UserError, match="training questions need answers"):
        rollouts_of(config(), questions=bare)
    with pytest.raises(UserError, match="leaves no room"):
        rollouts_of(config(data={"max_length": 3}))


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_a_policy_learns_what_is_rewarded(objective, monkeypatch):
    """Answers of even length count as right: half of them at first, nearly all after 60 steps of the trainer's loop."""
    rewarded = {"group_size": 8, "reward": "accuracy", "truncated": "graded"}
    run = config(objective, rollouts=rewarded, evaluation={"max_new_tokens": 4})
    monkeypatch.setattr("calibtrain.tasks.short_answer.grade", lambda text, accepted, method: len(text) % 2 == 0)
    rollouts, model = rollouts_of(run, ValueLossModel if objective == "ppo" else LossModel)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    correct = []
    for step in range(60):
        rollouts.before_step(step)
        correct.append(rollouts.metrics["correct"])
        batch = batch_of(rollouts)
        divisors = {name: count.float() for name, count in model.counts(batch).items()}
        loss, output = model(TrainStep(batch, divisors))
        torch.testing.assert_close(loss.detach(), mean_loss(output.terms))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(correct[:10]) / 10 < 0.65
    assert sum(correct[-10:]) / 10 > 0.85


@pytest.mark.parametrize(
    ("objective", "rollouts", "likelihood"),
    [
        ("grpo", {"reward": "log"}, 0.6),
        ("ppo", {"reward": "brier", "epochs": 3, "truncated": "graded"}, 0.6),
        ("rloo", {"reward": "accuracy"}, 1.0),
    ],
)
def test_a_whole_policy_ends_where_the_reward_says(objective, rollouts, likelihood, monkeypatch):
    """One of two answers is right, drawn anew for each question and round, .6 of the time the first."""
    right: dict[str, str] = {}
    monkeypatch.setattr(
        "calibtrain.tasks.short_answer.grade", lambda text, accepted, method: text == right[accepted[0]]
    )
    run = config(objective, rollouts={"group_size": 8, **rollouts}, evaluation={"max_new_tokens": 1})
    rollouts, model = rollouts_of(run, ValueLossModel if objective == "ppo" else LossModel)
    template = rollouts.answerer.template
    first, second = (template.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("a", "b"))
    with torch.no_grad():  # all other tokens out of reach
        head = model.policy.causal_model.get_output_embeddings()
        bias = torch.full((head.weight.shape[0],), -30.0)
        bias[[first, second]] = 0.0
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
    draw, found = random.Random(0), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(180):
        right.update({one.accepted[0]: "a" if draw.random() < 0.6 else "b" for one in QUESTIONS})
        rollouts.before_step(step)
        batch = batch_of(rollouts, rollouts.indices(step))
        divisors = {name: count.float() for name, count in model.counts(batch).items()}
        loss, output = model(TrainStep(batch, divisors))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(output.stats.logprob[batch.targets == first].exp().mean().item())
    assert torch.tensor(found[60:]).nanmean().item() == pytest.approx(likelihood, abs=0.06)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_rewards_that_do_not_differ_are_told_of_once(objective, monkeypatch, caplog):
    """Within a group for grpo and rloo, between groups for ppo, whose baseline is its value head."""
    run = config(objective, rollouts={"group_size": 2, "reward": "accuracy", "truncated": "graded"})
    right: list[str] = ["0"]
    monkeypatch.setattr("calibtrain.tasks.short_answer.grade", lambda text, accepted, method: accepted[0] in right)
    rollouts, _ = rollouts_of(run, ValueLossModel if objective == "ppo" else LossModel)
    for step in range(8):
        rollouts.before_step(step)
        assert rollouts.metrics["alike"] == (objective != "ppo" or rollouts.metrics["correct"] in (0.0, 1.0))
    if objective != "ppo":
        assert caplog.text.count("in 3 rounds in a row every answer earned") == 1
        return
    right.clear()
    for step in range(3):
        rollouts.before_step(step)
    assert "correct 0.00" in caplog.text

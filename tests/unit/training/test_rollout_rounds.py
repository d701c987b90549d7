"""Rounds of sampled answers: passes over them, answers that were cut, groups without a signal, another's log-probs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from calibtrain.confidence.generation import Generation
from calibtrain.data.drops import DropReport
from calibtrain.errors import UserError
from calibtrain.losses.terms import mean_loss
from calibtrain.models.loss_model import LogprobStep, LossModel, TrainStep
from calibtrain.models.reward import ValueLossModel, scalar_head
from calibtrain.models.value import OwnValueLossModel, ValueModel
from calibtrain.pipeline.check import expected_steps
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.rollout_credit import credit, groups_alike
from calibtrain.training.rounds import Rounds
from calibtrain.training.samples import Sample
from tests.tiny import tiny_model
from tests.unit.training.test_rollouts import QUESTIONS, batch_of, config, rollouts_of

# Which groups, when


def test_every_pass_takes_each_group_once_in_its_own_order():
    rounds = Rounds(questions=10, per_step=4, steps=3, epochs=3, seed=5)
    passes = [
        [k for step in range(first, first + 3) for k in rounds.groups(step)] for first in range(0, 18, 3)
    ]  # of two rounds
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert passes[0] == passes[3] == list(range(12))
    assert len({tuple(one) for one in passes}) == 5
    assert [rounds.begins(step) for step in range(10)] == [step % 9 == 0 for step in range(10)]
    assert Rounds(10, 4, 3, 3, 6).groups(4) != rounds.groups(4)


def test_rounds_take_up_the_stream_of_questions_whatever_their_passes():
    once, thrice = Rounds(10, 4, steps=2), Rounds(10, 4, steps=2, epochs=3)
    assert once.asked(0) + once.asked(2) + once.asked(4) == thrice.asked(0) + thrice.asked(6) + thrice.asked(17)
    assert sorted([*once.asked(0), *once.asked(2), *once.asked(4)][:10]) == list(range(10))


def test_others_were_not_asked_while_there_are_any():
    rounds = Rounds(10, 4)
    asked = set(rounds.asked(0))
    others = rounds.others(0, 1, 6, asked)
    assert sorted([*asked, *others]) == list(range(10))
    assert len(rounds.others(0, 1, 9, asked)) == 9  # more than there are: some twice
    assert set(rounds.others(0, 1, 3, set(range(10)))) <= set(range(10))
    assert rounds.others(0, 1, 6, asked) == others != rounds.others(0, 2, 6, asked)


def test_epochs_keep_what_was_known_when_sampling():
    run = config("ppo", rollouts={"group_size": 2, "epochs": 2, "truncated": "graded"})
    rollouts, model = rollouts_of(run, ValueLossModel)
    rollouts.before_step(0)
    kept = (rollouts.samples, rollouts._credit)
    first = batch_of(rollouts, (0, 1, 2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rollouts.before_step(1)
    assert (rollouts.samples, rollouts._credit) == kept
    second = batch_of(rollouts, (0, 1, 2, 3))
    for name in ("old_logprob", "old_values", "returns", "advantages"):
        assert getattr(second, name).equal(getattr(first, name))
    model.eval()
    assert (model(LogprobStep(second))[0] - second.old_logprob).abs().max() > 1e-3  # the policy moved
    other, _ = rollouts_of(run, ValueLossModel)  # resumed between the passes
    other.load_state_dict(json.loads(json.dumps(rollouts.state_dict())))
    assert other.metrics == rollouts.metrics
    assert other.indices(1) == rollouts.indices(1) != rollouts.indices(0)
    assert batch_of(other, other.indices(1)).advantages.equal(batch_of(rollouts, rollouts.indices(1)).advantages)
    rollouts.before_step(2)
    assert rollouts.samples != kept[0]


def test_every_round_but_the_first_is_drawn_ahead_whatever_the_passes(monkeypatch):
    engine = {"kind": "vllm", "address": "http://127.0.0.1:9/v1", "overlap": True}
    monkeypatch.setattr(
        "calibtrain.training.sampling.ServedSampling", lambda config, answerer, *_: OwnSampling(answerer)
    )
    run = config(rollouts={"group_size": 2, "epochs": 2, "engine": engine}, training={"epochs": 3})
    rollouts, _ = rollouts_of(run)
    assert expected_steps(run, SimpleNamespace(records=4, drops=DropReport(), plan=rollouts.plan)) == 6
    ahead = []
    monkeypatch.setattr(rollouts.sampling, "draw_ahead", lambda asked, streams, step, version: ahead.append(step))
    for step in range(6):
        rollouts.before_step(step)
    assert ahead == [2, 4]


def test_measures_are_those_of_the_formulas():
    run = config({"name": "ppo", "clip_low": 0.1, "clip_high": 0.15}, rollouts={"group_size": 4, "epochs": 2})
    rollouts, model = rollouts_of(run, ValueLossModel)
    rollouts.before_step(0)
    batch = replace(batch_of(rollouts), advantages=torch.randn(batch_of(rollouts).targets.shape))
    model.eval()
    divisors = {name: count.float() for name, count in model.counts(batch).items()}
    found = {name: one.total / one.count for name, one in model(TrainStep(batch, divisors))[1].measures.items()}
    assert set(found) == set(model.objective.measured)
    assert found["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert found["clip_share"] == found["value_clip_share"] == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    output = model(TrainStep(batch, divisors))[1]
    found = {name: one.total / one.count for name, one in output.measures.items()}
    ratio = (output.stats.logprob - batch.old_logprob).exp()
    low, high = (ratio < 0.9) & (batch.advantages < 0), (ratio > 1.15) & (batch.advantages > 0)
    for name, expected in {
        "clip_low": low.float().mean(),
        "clip_high": high.float().mean(),
        "clip_share": (low | high).float().mean(),
        "ratio": ratio.mean(),
        "ratio_variance": (ratio - 1).square().mean(),
        "policy_kl": (ratio - 1 - ratio.log()).mean(),
        "entropy": output.stats.entropy.mean(),
    }.items():
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-4, atol=1e-5)
    assert found["clip_share"] > 0


def own_values(policy, objective, penalties):
    model = tiny_model(400, seed=1)
    return OwnValueLossModel(policy, ValueModel(model, scalar_head(model, 3)), objective, penalties)


def test_a_value_model_learns_beside_the_policy(monkeypatch):
    """Two questions are always right, two always wrong: the values come to explain that, by a model of their own."""
    rollouts = {"group_size": 4, "reward": "accuracy", "truncated": "graded", "epochs": 2}
    run = config({"name": "ppo", "value_model": "own"}, rollouts=rollouts)
    monkeypatch.setattr("calibtrain.tasks.short_answer.grade", lambda text, accepted, method: accepted[0] in "01")
    rounds, model = rollouts_of(run, own_values)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    explained = []
    for step in range(60):
        rounds.before_step(step)
        explained.append(rounds.metrics["explained_variance"])
        batch = batch_of(rounds, rounds.indices(step))
        loss, _ = model(TrainStep(batch, {name: count.float() for name, count in model.counts(batch).items()}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert explained[0] < 0.1
    assert explained[-1] > 0.8


# Answers that were cut


def answers(*rows):
    """(question, tokens, correct, finished) each."""
    return [Sample(q, tuple(range(n)), float(c), 0.5, finished=f) for q, n, c, f in rows]


CUT = answers((0, 2, 1, True), (0, 2, 0, True), (0, 2, 0, False), (0, 2, 1, True))


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("rule", "mean", "learned"),
    [(None, 1 / 2, 4), ("graded", 1 / 2, 4), ("masked", 1 / 2, 3), ("left_out", 2 / 3, 3)],
)
def test_cut_answers_and_the_baseline(objective, rule, mean, learned):
    run = config(objective, rollouts={"reward": "accuracy", "truncated": rule})
    found, means = credit(CUT, [0] * 4, run)
    size = 3 if rule == "left_out" else 4
    scale = size / (size - 1) if objective == "rloo" else 1.0
    assert found[0].advantages == pytest.approx([(1 - mean) * scale] * 2)
    assert [one.learned for one in found] == [True, True, learned == 4, True]
    assert means["truncated"] == 0.25
    assert means["reward"] == pytest.approx(mean)


def test_a_cut_answer_ends_with_the_value_of_its_last_state():
    given = [replace(one, values=(0.2, 0.3), last_value=0.7) for one in CUT]
    run = config({"name": "ppo", "gamma": 0.9, "lam": 1.0}, rollouts={"reward": "accuracy"})
    found, means = credit(given, [0] * 4, run)
    assert found[0].returns == pytest.approx([0.9, 1.0])
    assert found[1].returns == pytest.approx([0.0, 0.0])
    assert found[2].returns == pytest.approx([0.81 * 0.7, 0.9 * 0.7])  # its grade of 0 is not the end's
    graded = config({"name": "ppo", "gamma": 0.9, "lam": 1.0}, rollouts={"reward": "accuracy", "truncated": "graded"})
    assert credit(given, [0] * 4, graded)[0][2].returns == pytest.approx([0.0, 0.0])
    assert means["reward"] == pytest.approx(2 / 3)
    out = config("ppo", rollouts={"reward": "accuracy", "truncated": "left_out"})
    found, _ = credit(given, [0] * 4, out)
    assert not found[2].learned
    flat = torch.tensor([a for one in found if one.learned for a in one.advantages])
    assert flat.mean().item() == pytest.approx(0.0, abs=1e-6)


def cut_some(monkeypatch, even=True):
    """Answers of an odd first token count as finished."""
    from calibtrain.training import own_sampling as sampling

    plain = sampling.generate

    def some(*arguments, **options):
        groups = plain(*arguments, **options)
        return [[replace(one, finished=one.tokens[0] % 2 == even) for one in group] for group in groups]

    monkeypatch.setattr(sampling, "generate", some)


@pytest.mark.parametrize("rule", ["graded", "left_out", "masked", "bootstrapped"])
def test_what_of_cut_answers_is_in_a_batch(rule, monkeypatch):
    """Their likelihood is scored where the cut is the end alone; left out they are in no batch at all."""
    cut_some(monkeypatch)
    name = "ppo" if rule == "bootstrapped" else "grpo"
    run = config(name, rollouts={"group_size": 4, "truncated": rule})
    rollouts, model = rollouts_of(run, ValueLossModel if name == "ppo" else LossModel)
    rollouts.before_step(0)
    finished = sum(one.finished for one in rollouts.samples)
    assert 0 < finished < len(rollouts.samples)
    batch = batch_of(rollouts)
    counts = model.counts(batch)
    assert counts["answer_score"] == (len(rollouts.samples) if rule == "graded" else finished)
    assert len(batch.roles) == (finished if rule in ("left_out", "masked") else len(rollouts.samples))
    loss, _ = model(TrainStep(batch, {key: count.float() for key, count in counts.items()}))
    assert loss.isfinite()
    if rule == "bootstrapped":
        model.eval()
        after = model(LogprobStep(batch, after=True))[1][batch.targets.shape[0] :]
        torch.testing.assert_close(
            after, torch.tensor([one.last_value for one in rollouts.samples]), rtol=1e-4, atol=1e-5
        )


def test_nothing_left_of_a_micro_batch_is_no_error(monkeypatch):
    run = config(rollouts={"group_size": 2, "reward": "accuracy", "truncated": "left_out"})
    rollouts, model = rollouts_of(run)
    rollouts.before_step(0)
    assert not any(one.finished for one in rollouts.samples)
    batch = batch_of(rollouts)
    assert len(batch.roles) == 0
    loss, output = model(TrainStep(batch, {"policy": torch.tensor(1.0)}))
    assert loss == 0
    assert mean_loss(output.terms) == 0


# Groups without a signal


def test_groups_are_alike_where_all_that_earn_anything_earn_the_same():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0, 0.0, 1.0, nan, 2.0, nan, nan, 3.0, 3.0]]).repeat(2, 1).double()
    ids, learned = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), torch.ones(10, dtype=torch.bool)
    assert groups_alike(rewards, ids, learned).tolist() == [True, False, True, True, True]
    rewards[1, 0] = 0.5  # the score of its confidence
    assert groups_alike(rewards, ids, learned).tolist() == [False, False, True, True, True]
    learned[1:3] = False  # cut, and masked
    assert groups_alike(rewards, ids, learned).tolist() == [False, False, True, True, True]
    learned[3] = False
    assert groups_alike(rewards, ids, learned).tolist() == [False, True, True, True, True]
    same = answers((0, 3, 1, True), (0, 2, 1, True))
    for head, told in (({}, 1.0), ({"trains_backbone": True}, 0.0)):  # whose score then teaches all the same
        accuracy = config(rollouts={"group_size": 2, "reward": "accuracy"}, confidence_head=head)
        assert credit(same, [0, 0], accuracy)[1]["alike"] == told
    masked = config(rollouts={"group_size": 2, "reward": "accuracy", "truncated": "masked"})
    assert credit(answers((0, 3, 1, False), (0, 3, 0, False)), [0, 0], masked)[1]["alike"] == 1.0


def with_signal(rollouts):
    correct = torch.tensor([one.correct for one in rollouts.samples]).reshape(-1, rollouts.config.rollouts.group_size)
    return (correct.amax(1) > correct.amin(1)).tolist()


def test_groups_alike_are_asked_anew(monkeypatch):
    """Half of the questions are always answered right: others take their places, and what was thrown away is told."""
    easy = {str(i) for i in range(0, 40, 2)}
    monkeypatch.setattr(
        "calibtrain.tasks.short_answer.grade",
        lambda text, accepted, method: accepted[0] != "none" and (accepted[0] in easy or len(text) % 2 == 0),
    )
    questions = [replace(QUESTIONS[0], accepted=(str(i),), origin=f"r{i}") for i in range(40)]
    rollouts = {"group_size": 6, "reward": "accuracy"}
    plain, _ = rollouts_of(config(rollouts=rollouts), questions=questions)
    run = config(rollouts={**rollouts, "dynamic_sampling": 20, "steps_per_round": 2})
    chosen, _ = rollouts_of(run, questions=questions)
    plain.before_step(0)
    chosen.before_step(0)
    assert not all(with_signal(plain))
    assert all(with_signal(chosen))
    told = chosen.metrics
    assert told["alike"] == told["without_signal"] == 0.0
    assert told["asked"] == 8 + told["thrown_away"] > 8
    assert told["asked_anew"] >= 1
    again, _ = rollouts_of(run, questions=questions)
    again.before_step(0)
    assert again.samples == chosen.samples
    again.load_state_dict(json.loads(json.dumps(chosen.state_dict())))
    assert again.metrics == told
    hopeless = [replace(one, accepted=("none",)) for one in questions[::2]]
    never, _ = rollouts_of(config(rollouts={**rollouts, "dynamic_sampling": 2}), questions=hopeless)
    never.before_step(0)
    assert never.metrics["without_signal"] == 1.0
    assert (never.metrics["asked"], never.metrics["asked_anew"]) == (12, 2)
    assert len(never.samples) == 4 * 6


# Another sampler's log-probs


def test_importance_weights_correct_for_another_sampler(monkeypatch):
    """A sampler that gives each token half a nat less than the trainer: weights of exp(.5), cut at their cap."""
    from calibtrain.training import own_sampling as sampling

    plain = sampling.generate

    def other(*arguments, **options):
        groups = plain(*arguments, **options)
        return [[less(one) for one in group] for group in groups]

    def less(one: Generation) -> Generation:
        return replace(one, logprobs=tuple(value - 0.5 for value in one.logprobs))

    monkeypatch.setattr(sampling, "generate", other)
    for how, cap, expected in (
        ("token_truncate", 3.0, math.exp(0.5)),
        ("token_truncate", 1.5, 1.5),
        ("token_mask", 1.5, 0.0),
        ("sequence_truncate", 9.0, math.exp(1.5)),
    ):
        run = config(rollouts={"group_size": 3, "reward": "accuracy", "correction": how, "correction_cap": cap})
        rollouts, model = rollouts_of(run)
        rollouts.before_step(0)
        batch = batch_of(rollouts)
        whole = torch.bincount(batch.sequence_ids) == 3
        read = whole[batch.sequence_ids] if how.startswith("sequence") else torch.ones_like(batch.is_completion)
        torch.testing.assert_close(
            batch.importance[read], torch.full_like(batch.importance[read], expected), rtol=1e-4, atol=1e-5
        )
        assert batch.old_logprob is None  # sampled by this very policy: the ratio is 1
        assert rollouts.metrics["sampling_difference_mean"] == pytest.approx(0.5, abs=1e-4)
        assert rollouts.metrics["sampling_kl"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-3)
        batch = replace(batch, advantages=torch.ones_like(batch.advantages))
        model.eval()
        terms = model(TrainStep(batch, {"policy": torch.tensor(1.0)}))[1].terms
        assert terms["policy"].total == pytest.approx(-float(weighted_mean(batch)), rel=1e-4)


def weighted_mean(batch):
    """Sum of the sequences' mean weights: what the loss is with a ratio and an advantage of 1."""
    lengths = torch.bincount(batch.sequence_ids)
    return (batch.importance / lengths[batch.sequence_ids]).sum()


def test_own_sampling_agrees_with_the_trainer():
    rollouts, _ = rollouts_of(config(rollouts={"group_size": 4, "epochs": 2}))
    rollouts.before_step(0)
    assert rollouts.metrics["sampling_difference_max"] < 1e-4
    silent = [replace(one, sampled_logprobs=()) for one in rollouts.samples]
    assert "sampling_kl" not in credit(silent, [0] * len(silent), rollouts.config)[1]
    corrected = config(rollouts={"group_size": 4, "correction": "token_truncate"})
    with pytest.raises(UserError, match="it gives none"):
        credit(silent, [0] * len(silent), corrected)


@pytest.mark.parametrize(
    ("objective", "rollouts", "message"),
    [
        ("grpo", {"truncated": "bootstrapped"}, "needs a value of each state"),
        ("ppo", {"truncated": "masked"}, "group's baseline"),
        ("ppo", {"dynamic_sampling": 1, "reward": "accuracy"}, "its baseline is a value"),
        ("grpo", {"dynamic_sampling": 1}, "a score in the loss"),
        ("grpo", {"dynamic_sampling": 10**6, "reward": "accuracy"}, "less than or equal to 100"),
        ("grpo", {"dynamic_sampling": 1, "confidence": "head"}, "a score in the loss"),
        ("rloo", {"correction": "token_truncate"}, "weighs whole answers"),
    ],
)
def test_what_an_objective_cannot_learn_from_is_refused(objective, rollouts, message):
    with pytest.raises(ValueError, match=message):
        config(objective, rollouts=rollouts)

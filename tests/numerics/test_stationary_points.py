"""Where training ends on a toy whose truth is a distribution: for each reward, algorithm and source of the confidence."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from stationary_points import NEVER, THREE, TWO, Toy, find_end, ppo_c_rewards, run_config, score_end

from calibtrain.losses.answer_score import answer_brier_score, answer_log_score
from calibtrain.losses.kl import KL_ESTIMATORS
from calibtrain.losses.reward_model import ppo_m_loss

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "grpo": {"name": "grpo"},
    "grpo, std of the group": {"name": "grpo", "scale_advantages": "group"},
    "grpo, std of the batch": {"name": "grpo", "scale_advantages": "batch"},
    "dapo": {"name": "grpo", "norm": "token", "clip_high": 0.28},
    "dr. grpo": {"name": "grpo", "norm": "constant", "length": 1},
    "rloo": {"name": "rloo"},
    "ppo": {"name": "ppo"},
}
ROUNDS = [*((name, 1) for name in OBJECTIVES), *((name, 4) for name in ("grpo", "rloo", "ppo"))]
STATED = [
    *((name, steps, False) for name, steps in ROUNDS),
    *((name, 1, True) for name in OBJECTIVES if name not in ("rloo", "ppo")),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def end(objective, toy, *, paid=None, steps=130, penalties=(), target_risk=0.2, **rollouts):
    config = run_config(
        OBJECTIVES[objective], rollouts, penalties=list(penalties), abstention={"target_risk": target_risk}
    )
    return find_end(config, toy, paid, steps=steps, rate=0.15)


def descend(leaves, loss, steps=400, rate=0.1):
    optimizer = torch.optim.Adam(leaves, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


# The likelihood as confidence


@pytest.mark.parametrize("reward", ["brier", "log"])
@pytest.mark.parametrize(("objective", "steps_per_round"), ROUNDS)
def test_the_score_of_a_likelihood_ends_at_the_truth(objective, steps_per_round, reward):
    """Also on the samples of an earlier policy, taken as they are."""
    found = end(objective, Toy(THREE), reward=reward, steps_per_round=steps_per_round)
    assert found.answers == pytest.approx(THREE, abs=3e-3)


@pytest.mark.parametrize(("objective", "steps_per_round"), ROUNDS)
def test_accuracy_alone_ends_sure(objective, steps_per_round):
    assert end(objective, Toy(TWO), reward="accuracy", steps_per_round=steps_per_round).answers[0] > 0.98


@pytest.mark.parametrize(
    ("objective", "reward", "truth", "first"),
    [
        ("rloo", "brier", TWO, 0.7),  # t + a (2t - 1) / (2w)
        ("grpo", "brier", TWO, 0.65),  # its mean holds the own reward: a (G - 1) / G, of groups of 2
        ("rloo", "log", TWO, 0.646),
        ("rloo", "log", THREE, 0.584),
    ],
)
def test_a_reward_for_accuracy_beside_the_score_ends_above_the_truth(objective, reward, truth, first):
    found = end(objective, Toy(truth), steps=400, reward=reward, accuracy_weight=1.0)
    assert found.answers[0] == pytest.approx(first, abs=3e-3)
    penalty = {"name": "answer_score", "moves": "all", "score": reward}
    composed = end(objective, Toy(truth), steps=400, reward="accuracy", penalties=[penalty])
    assert composed.answers == pytest.approx(found.answers, abs=1e-6)  # the same loss, composed by hand


def test_a_penalty_may_stand_in_the_place_of_the_rollouts_score():
    penalty = {"name": "answer_score", "moves": "all", "score": "log", "weight": 0.3}
    found = end("grpo", Toy(THREE), penalties=[penalty])  # rollouts.reward: brier
    assert found.answers == pytest.approx(THREE, abs=2e-3)


@pytest.mark.parametrize(("score", "first"), [("brier", 0.504), ("log", 0.519)])
def test_what_is_never_right_takes_what_the_others_leave(score, first):
    """Likelihoods add up to 1: where the answers' chances do not, they end a little above them."""
    found = end("rloo", Toy(NEVER), steps=400, reward=score).answers
    assert found[0] == pytest.approx(first, abs=3e-3)
    assert max(found[2:]) < 0.05


@pytest.mark.parametrize("score", ["brier", "log"])
def test_credit_for_what_is_easy_to_score_ends_elsewhere(score):
    """Why the score's term leaves out that sampling depends on the weights: docs/rewards.md."""
    assert score_end(THREE, score, "loss").answers == pytest.approx(THREE, abs=2e-3)
    assert score_end(THREE, score, "whole").answers[0] == pytest.approx(0.443, abs=2e-3)
    assert sum(score_end(NEVER, score, "whole").answers[:2]) < 0.02  # wrong on purpose, and sure of it
    assert score_end(TWO, "brier", "reward").answers[0] > 0.98  # a constant teaches nothing of itself


@pytest.mark.parametrize("score", [answer_brier_score, answer_log_score])
def test_whoever_draws_the_answers_the_score_is_least_at_the_truth(score):
    truth = torch.tensor(THREE, dtype=torch.float64)
    for drawn in ((0.1, 0.1, 0.8), (1 / 3, 1 / 3, 1 / 3)):
        logits, share = torch.zeros(3, dtype=torch.float64).requires_grad_(), torch.tensor(drawn).double()

        def loss(logits=logits, share=share):
            logprob = logits.log_softmax(0)
            ones = torch.ones_like(truth)
            return (share * (truth * score(logprob, ones) + (1 - truth) * score(logprob, 0 * ones))).sum()

        descend([logits], loss)
        torch.testing.assert_close(logits.softmax(0).detach(), truth, atol=2e-3, rtol=0)


# A confidence head


@pytest.mark.parametrize(
    ("objective", "reward", "through"), [("rloo", "log", False), ("grpo", "brier", True), ("ppo", "log", True)]
)
def test_a_head_ends_at_the_truth_while_the_policy_ends_sure(objective, reward, through):
    """The reward is for being right alone; the score's gradient, also where it reaches the policy, changes no answer."""
    rollouts = {"reward": reward, "confidence": "head"}
    config = run_config(OBJECTIVES[objective], rollouts, confidence_head={"trains_backbone": through})
    found = find_end(config, Toy(TWO), steps=250, rate=0.15)
    assert found.answers[0] > 0.98
    assert found.told == pytest.approx(TWO, abs=0.02)


# A stated confidence


@pytest.mark.parametrize(("objective", "steps_per_round", "decoupled"), STATED)
@pytest.mark.parametrize(("reward", "weight"), [("brier", 1.0), ("log", 7.0)])
def test_a_stated_confidence_ends_at_the_truth(objective, steps_per_round, decoupled, reward, weight):
    rollouts = {"reward": reward, "accuracy_weight": weight, "steps_per_round": steps_per_round}
    found = end(objective, Toy(TWO, stated=True), confidence="stated", decoupled=decoupled, **rollouts)
    assert found.answers[0] > 0.98
    if objective == "grpo, std of the group" and not decoupled:
        assert found.stated[0] > 0.98  # a score divided by its group's spread is a rank; training refuses it
    else:
        assert found.stated[0] == pytest.approx(0.6, abs=0.02)


def test_a_target_mixed_with_the_others_is_the_answers_own_where_they_agree():
    """Answers kept at 1/2 each, right .8 and .2 of the time: mixed by half, the targets are .65 and .35 on a grid of .2."""
    mixed = Toy((0.8, 0.2), stated=True, start=(0.0, 0.0))
    rollouts = {"confidence": "stated", "reward": "brier"}
    assert end("grpo", mixed, **rollouts).stated == pytest.approx((0.8, 0.2), abs=0.02)
    assert end("grpo", mixed, target_mixing=0.5, **rollouts).stated == pytest.approx((0.6, 0.4), abs=0.02)
    one = Toy((0.8, 0.2), stated=True)
    assert end("grpo", one, target_mixing=0.5, **rollouts).stated[0] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("name", "stated"), [("PPO-C, threshold", 1.0), ("PPO-C, difference", 1.0), ("PPO-C, proper", 0.6)]
)
def test_ppo_c_ends_sure_as_published_and_at_the_truth_in_its_proper_form(name, stated):
    found = end("rloo", Toy(TWO, stated=True), paid=ppo_c_rewards()[name], confidence="stated", decoupled=False)
    assert found.answers[0] > 0.98
    assert found.stated[0] == pytest.approx(stated, abs=0.02)


@pytest.mark.parametrize("truth", [0.3, 0.6, 0.9])
def test_ppo_m_ends_at_the_log_odds_so_that_a_policy_states_the_likelier_side(truth):
    """Its reward model learns by how much high beats low: log(t / (1 - t)), whose sign alone maximising it follows."""
    high, low = (torch.zeros(1, dtype=torch.float64).requires_grad_() for _ in range(2))
    other = torch.zeros(1, dtype=torch.float64)

    def loss():  # the answer is the better one of its pair with chance `truth`
        better, worse = ppo_m_loss(high, low, other, other), ppo_m_loss(other, other, high, low)
        return (truth * better + (1 - truth) * worse).sum()

    descend([high, low], loss)
    assert (high - low).item() == pytest.approx(math.log(truth / (1 - truth)), abs=1e-2)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_a_ternary_reward_answers_where_the_risk_allows_it(objective):
    toy = Toy((*TWO, 0.0), abstains=True)
    assert end(objective, toy, reward="ternary", target_risk=0.5).answers[0] > 0.98
    assert end(objective, toy, reward="ternary", target_risk=0.3).answers[2] > 0.98


# The KL


REFERENCE, PAID, BETA = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.4, 0.2, 0.0]).double(), 0.2


@pytest.mark.parametrize(("name", "right"), [("k2", True), ("k3+", True), ("k3", False)])
def test_a_reward_and_a_kl_end_at_the_tilted_reference(name, right):
    """pi proportional to reference * exp(reward / beta); k3 as published pulls with the gradient of another divergence."""
    logits = torch.zeros(3, dtype=torch.float64).requires_grad_()

    def loss():
        logprob = logits.log_softmax(0)
        kl = KL_ESTIMATORS[name](logprob, REFERENCE.log())
        return (logprob.detach().exp() * (BETA * kl - PAID * logprob)).sum()

    descend([logits], loss)
    wanted = (REFERENCE.log() + PAID / BETA).softmax(0)
    error = (logits.softmax(0).detach() - wanted).abs().max().item()
    assert error < 2e-3 if right else error > 0.02


def test_a_kl_in_the_loss_leaves_out_what_comes_after_a_token():
    """Two tokens, the second one paid for: in the reward the divergence of what follows counts, in the loss it does not."""
    reference = torch.tensor([[0.5, 0.5], [0.05, 0.95]]).double().log() + math.log(0.5)  # (first, second)
    ratio_first, ratio_second = torch.full((2,), math.log(0.5)).double(), reference - math.log(0.5)
    paid = torch.tensor([1.0, 0.0]).double()
    wanted = (reference + paid / BETA).flatten().softmax(0)
    ends = {}
    for where in ("reward", "loss"):
        one, two = torch.zeros(2).double().requires_grad_(), torch.zeros(2, 2).double().requires_grad_()

        def loss(one=one, two=two, where=where):
            first, second = one.log_softmax(0)[:, None], two.log_softmax(1)
            whole = first + second
            drawn = whole.detach().exp()
            if where == "reward":
                return -(drawn * (paid - BETA * (whole - reference)).detach() * whole).sum()
            kl = KL_ESTIMATORS["k2"]
            return (drawn * (BETA * (kl(first, ratio_first[:, None]) + kl(second, ratio_second)) - paid * whole)).sum()

        descend([one, two], loss)
        whole = one.log_softmax(0)[:, None] + two.log_softmax(1)
        ends[where] = (whole.detach().exp().flatten() - wanted).abs().max().item()
    assert ends["reward"] < 2e-3
    assert ends["loss"] > 0.02


def test_the_page_shows_what_the_benchmark_found():
    rows = json.loads((ROOT / "benchmarks" / "results" / "stationary_points.json").read_text())["rows"]
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    for row in rows:
        ends = (row["stated"] and f"states {row['stated']}") or row["ends"]
        assert f"| {row['what']} | {row['truth']} | {ends} |" in page, row

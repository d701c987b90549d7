"""Where training ends on a toy whose truth is a distribution: for each reward, algorithm and source of the confidence."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _stationary_toy import Toy, stats_of
from stationary_points import (
    MODEL,
    NEVER,
    THREE,
    TWO,
    after_ppo_m,
    find_end,
    knowing,
    liking,
    preferring_second,
    run_config,
    score_end,
)

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.answer_score import answer_brier_score, answer_log_score
from calibtrain.losses.kl import KL_ESTIMATORS
from calibtrain.losses.policy_gradient import RLOOLoss
from calibtrain.losses.reward_model import ppo_m_loss
from calibtrain.losses.terms import ANSWER
from calibtrain.training.rollout_credit import credit
from calibtrain.training.samples import Sample

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "grpo": {"name": "grpo"},
    "grpo, std of the group": {"name": "grpo", "scale_advantages": "group"},
    "grpo, std of the batch": {"name": "grpo", "scale_advantages": "batch"},
    "dapo": {"name": "grpo", "norm": "token", "clip_high": 0.28},
    "dr. grpo": {"name": "grpo", "norm": "constant", "length": 1},
    "rloo": {"name": "rloo"},
    "ppo": {"name": "ppo"},
    "ppo, own values": {"name": "ppo", "value_model": "own"},
}
ROUNDS = [*((name, 1) for name in OBJECTIVES), *((name, 4) for name in ("grpo", "rloo", "ppo"))]
"""Objectives, and how many steps learn from one round: passes over it and mini-batches are alike in the exact gradient."""
STATED = [
    *((name, steps, False) for name, steps in ROUNDS),
    *((name, 1, True) for name in OBJECTIVES if not name.startswith(("rloo", "ppo"))),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def end(objective, toy, *, steps=130, penalties=(), target_risk=0.2, **rollouts):
    config = run_config(
        OBJECTIVES[objective], rollouts, penalties=list(penalties), abstention={"target_risk": target_risk}
    )
    return find_end(config, toy, steps=steps, rate=0.15)


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
    found = end(objective, Toy(THREE), reward=reward, epochs=steps_per_round)
    assert found.answers == pytest.approx(THREE, abs=3e-3)


@pytest.mark.parametrize(("objective", "steps_per_round"), ROUNDS)
def test_accuracy_alone_ends_sure(objective, steps_per_round):
    assert end(objective, Toy(TWO), reward="accuracy", epochs=steps_per_round).answers[0] > 0.98


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
    rollouts = {"reward": reward, "accuracy_weight": weight, "epochs": steps_per_round}
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


@pytest.mark.parametrize(("form", "stated"), [("threshold", 1.0), ("difference", 1.0), ("proper", 0.6)])
@pytest.mark.parametrize(("objective", "decoupled"), [("rloo", False), ("ppo", False), ("grpo", True)])
def test_ppo_c_ends_sure_as_published_and_at_the_truth_in_its_proper_form(objective, decoupled, form, stated):
    rollouts = {**MODEL, "reward": "ppo_c", "confidence": "stated", "decoupled": decoupled, "ppo_c": {"form": form}}
    found = end(objective, Toy(TWO, stated=True, scores=knowing), **rollouts)
    assert found.answers[0] > 0.98
    assert found.stated[0] == pytest.approx(stated, abs=0.02)


def test_a_soft_target_of_ppo_c_ends_at_its_mean():
    """.6 sigmoid(2 (1 - 0)) + .4 sigmoid(2 (-1 - 0)) = .58, on a grid of .2."""
    ppo_c = {"form": "proper", "scale": 2.0}
    found = end(
        "rloo",
        Toy(TWO, stated=True, scores=knowing),
        **MODEL,
        reward="ppo_c",
        confidence="stated",
        decoupled=False,
        ppo_c=ppo_c,
    )
    assert found.stated[0] == pytest.approx(0.6, abs=0.02)


# A reward model


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_a_reward_model_alone_ends_sure(objective):
    """Also of what is stated to one that likes high confidence, or that PPO-M trained: each is followed to its end."""
    assert end(objective, Toy(TWO, scores=knowing), **MODEL).answers[0] > 0.98
    for scores in (liking, after_ppo_m):
        found = end(objective, Toy(TWO, stated=True, scores=scores), **MODEL, confidence="stated")
        assert found.answers[0] > 0.98
        assert found.stated[0] > 0.98


def test_a_score_beside_a_reward_model_ends_where_it_does_beside_the_grade():
    """A model that gives 1 or -1 is worth twice what a grade is; a statement with its own credit is honest."""
    graded = end("rloo", Toy(TWO), steps=400, reward="log", accuracy_weight=1.0)
    found = end("rloo", Toy(TWO, scores=knowing), steps=400, **MODEL, reward="log", accuracy_weight=0.5)
    assert found.answers == pytest.approx(graded.answers, abs=1e-6)
    stated = end("grpo", Toy(TWO, stated=True, scores=knowing), **MODEL, reward="brier", confidence="stated")
    assert stated.answers[0] > 0.98
    assert stated.stated[0] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("weight", "first"), [(0.1, True), (1.0, False)])
def test_a_mixture_ends_at_what_earns_most_in_sum(weight, first):
    """.2 more for the answer that is oftener right, against the weight of a model that likes the other one."""
    sources = [{"kind": "grade"}, {**MODEL["sources"][0], "weight": weight}]
    found = end("rloo", Toy(TWO, scores=preferring_second), sources=sources)
    assert (found.answers[0] > 0.98) == first
    assert (found.answers[1] > 0.98) != first
    normal = [{"kind": "grade"}, {**MODEL["sources"][0], "weight": 0.02, "normalize": True, "clip": 1.0}]
    assert end("rloo", Toy(TWO, scores=preferring_second), sources=normal).answers[0] > 0.98


def test_a_proxy_beside_the_ternary_reward_moves_its_threshold():
    """At a risk of .5 answering earns .6 - .4 = .2: a format's .3 for abstaining turns it."""
    toy = Toy((*TWO, 0.0), abstains=True, scores=lambda answer, right, stated: (0.3 * (answer == 2),))
    sources = [{"kind": "grade"}, MODEL["sources"][0]]
    assert end("rloo", toy, reward="ternary", sources=sources, target_risk=0.5).answers[2] > 0.98
    plain = Toy((*TWO, 0.0), abstains=True, scores=lambda answer, right, stated: (0.1 * (answer == 2),))
    assert end("rloo", plain, reward="ternary", sources=sources, target_risk=0.5).answers[0] > 0.98


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


# Answers that are cut, groups without a signal, another sampler


BROKEN = (0.5, 0.3, 0.0)
"""The last one is cut, always; as it stands it is never right."""


@pytest.mark.parametrize(
    ("objective", "rule", "third"),
    [
        ("grpo", "left_out", 0.2),
        ("grpo", "masked", 0.2),
        ("rloo", "left_out", 0.2),
        ("ppo", None, 0.2),
        ("grpo", None, 0),
    ],
)
@pytest.mark.parametrize("reward", ["brier", "log"])
def test_a_cut_answer_is_not_scored_but_where_the_cut_is_its_end(objective, rule, third, reward):
    """Left out it takes what the others leave, which end at the truth; graded it is wrong, and pushes them above it."""
    found = end(objective, Toy(BROKEN, cut=(None, None, 0.0)), steps=300, reward=reward, truncated=rule).answers
    if third:
        assert found == pytest.approx((0.5, 0.3, third), abs=3e-3)
    else:
        assert found[2] < 0.17


@pytest.mark.parametrize("objective", ["ppo", "ppo, own values"])
def test_a_cut_answer_is_worth_what_it_comes_to(objective):
    """The others are right .6 and .4 of the time; the cut one would have been .9 of the time, as it stands it is wrong."""
    toy = Toy((*TWO, 0.0), cut=(None, None, 0.9))
    assert end(objective, toy, reward="accuracy", steps=300).answers[2] > 0.98
    assert end(objective, toy, reward="accuracy", truncated="graded", steps=300).answers[0] > 0.98
    assert end(objective, toy, reward="accuracy", truncated="left_out", steps=300).answers[2] < 0.4


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_masked_answers_make_the_others_worth_more_and_left_out_ones_do_not(objective):
    """Two answers, the second cut: masked it is wrong in the first one's baseline, left out there is nothing to learn."""
    toy = Toy((0.6, 0.0), cut=(None, 0.0))
    assert end(objective, toy, reward="accuracy", truncated="masked").answers[0] > 0.95
    assert end(objective, toy, reward="accuracy", truncated="left_out").answers[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "rloo"])
def test_throwing_groups_alike_away_moves_no_end(objective):
    """They have no credit in either case: what is left counts for more, by one factor."""
    assert end(objective, Toy(TWO), reward="accuracy", dynamic_sampling=1, epochs=2).answers[0] > 0.98
    toy = Toy(TWO, stated=True)
    found = end(objective, toy, confidence="stated", decoupled=False, dynamic_sampling=1, steps=200)
    assert found.answers[0] > 0.98
    assert found.stated[0] == pytest.approx(0.6, abs=0.02)


MIDDLE = torch.tensor([0.0, 0.5, 0.0]).double()


def sampled_elsewhere(correction):
    """End of a policy of one number, logits (0, x, 2x), paid MIDDLE less the KL, whose samples another policy draws."""
    place = torch.tensor([0.0, 1.0, 2.0]).double()
    x = torch.zeros((), dtype=torch.float64).requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    config = run_config(
        {"name": "rloo", "beta": BETA},
        {"reward": "accuracy", "group_size": 2, "correction": correction, "correction_cap": 99},
    )
    objective = RLOOLoss()

    def loss():
        logprob = (x * place).log_softmax(0)
        now, flat = logprob.detach(), pairs.flatten()
        drawn = (0.4 * x.detach() * place + torch.tensor([2.0, 0.0, 0.0])).log_softmax(0)  # another's log-probs
        samples = [
            Sample(0, (i,), MIDDLE[i].item(), 0.5, logprobs=(now[i].item(),), reference=(REFERENCE[i].log().item(),),
                   sampled_logprobs=(drawn[i].item(),))
            for i in flat.tolist()
        ]  # fmt: skip
        owner = torch.arange(len(pairs)).repeat_interleave(2)
        found, _ = credit(samples, owner.tolist(), config)
        chance = drawn.exp()[pairs].prod(1)[owner]
        batch = collate([Encoded((7, *one.tokens), 1, ANSWER, 0) for one in samples], 0)
        weights = None
        if config.rollouts.correction != "none":
            weights = torch.tensor([one.importance[0] for one in found], dtype=torch.float64)
        advantages = torch.tensor([one.advantages[0] for one in found], dtype=torch.float64)
        batch = replace(batch, advantages=advantages * chance, importance=weights)
        return objective(stats_of(logprob[flat]), batch)["policy"].total

    descend([x], loss, steps=150)
    return x.item()


MIXED = {"group_size": 2, "sources": [{"kind": "grade"}, {**MODEL["sources"][0], "weight": 0.5}], "epochs": 2}
"""Being right pays 1 by the grade and 1 by a reward model that knows it."""


@pytest.mark.parametrize(("objective", "share"), [("dapo", 0.5), ("rloo", 1.0)])
@pytest.mark.parametrize("rule", ["graded", "masked"])
def test_a_mixture_beside_the_score_ends_by_its_sum_also_over_several_passes(objective, share, rule):
    """At t + a (2t - 1) / 2 with a the accuracy_weight times what all sources pay, by GRPO times (G - 1) / G."""
    mixed = {**MIXED, "reward": "brier", "accuracy_weight": 0.25, "truncated": rule}
    end = find_end(run_config(OBJECTIVES[objective], mixed), Toy(TWO, scores=knowing), steps=800)
    assert end.answers[0] == pytest.approx(0.6 + share * 0.25 * 2.0 * 0.2 / 2.0, abs=2e-3)


@pytest.mark.parametrize(("objective", "rule"), [("grpo", "masked"), ("ppo, own values", "left_out")])
def test_a_head_tells_the_truth_beside_sources_and_answers_that_are_cut(objective, rule):
    mixed = {**MIXED, "reward": "log", "confidence": "head", "truncated": rule}
    config = run_config(OBJECTIVES[objective], mixed, confidence_head={})
    end = find_end(config, Toy((*TWO, 0.0), scores=knowing, cut=(None, None, 0.0)), steps=800)
    assert end.answers[0] > 0.99
    assert end.told[:2] == pytest.approx(TWO, abs=0.02)


def test_importance_weights_bring_another_samplers_end_back():
    """Where parameters are shared, who samples decides what is learnt: weighted, it ends as on the policy's own samples."""
    place = torch.tensor([0.0, 1.0, 2.0]).double()
    grid = torch.linspace(-3, 3, 6001).double()
    logprob = (grid[:, None] * place).log_softmax(1)
    worth = (logprob.exp() * (MIDDLE - BETA * (logprob - REFERENCE.log()))).sum(1)
    best = grid[worth.argmax()].item()
    assert sampled_elsewhere("sequence_truncate") == pytest.approx(best, abs=0.01)
    assert abs(sampled_elsewhere("none") - best) > 0.05


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

"""What answers earn: every source, their mixture, and what the next round knows of this one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from calibtrain.config_rollouts import RolloutsConfig
from calibtrain.errors import UserError
from calibtrain.training.reward_memory import NOTHING, WATCHED, Memory, Moments, slope_t
from calibtrain.training.reward_rounds import score_auroc
from calibtrain.training.reward_sources import source_names
from calibtrain.training.rollout_credit import credit
from calibtrain.training.rollout_rewards import check_rewards, remembered, rewards_of, worth_of
from tests.unit.training.test_rollouts import config, samples

IDS = torch.tensor([0, 0, 1, 1])


def paid(*rewards, correct=(1, 0, 1, 0), confidence=(0.9, 0.6, 0.1, 0.5)):
    """Four samples of two questions, each with what its asked sources gave."""
    rows = samples(*((i // 2, 1 + i, c, q) for i, (c, q) in enumerate(zip(correct, confidence, strict=True))))
    return [replace(one, rewards=given) for one, given in zip(rows, rewards or [()] * 4, strict=True)]


def run(*sources, objective="rloo", **rollouts):
    return config(objective, rollouts={"group_size": 2, "sources": [*sources], **rollouts})


MODEL = {"kind": "model", "path": "x", "normalize": False}
SCORES = [(3.0,), (-1.0,), (0.5,), (1.5,)]


def test_a_worth_is_the_weighted_sum_of_its_sources():
    mixed = run({**MODEL, "weight": 0.5}, {"kind": "grade", "weight": 2.0}, {"kind": "length", "free": 2, "full": 4})
    assert worth_of(paid(*SCORES), IDS, mixed).tolist() == [3.5, -0.5, 2.25 - 0.5, 0.75 - 1.0]
    rewards, nothing = rewards_of(paid(*SCORES), IDS, mixed)
    assert rewards.tolist() == [3.5, -0.5, 1.75, -0.25]
    assert not nothing.any()


def test_old_keys_are_short_for_sources():
    grade = run({"kind": "grade"})
    assert grade.rollouts.reward == "sources"
    plain = config("rloo", rollouts={"reward": "accuracy"})
    assert rewards_of(paid(), IDS, grade).equal(rewards_of(paid(), IDS, plain))
    model = config("rloo", rollouts={"reward_model": "x"})
    assert model.rollouts.reward == "model"
    assert model.rollouts.paid_by == run({**MODEL, "normalize": True}).rollouts.paid_by
    assert not model.rollouts.needs_grades
    assert plain.rollouts.needs_grades


def test_values_are_normalised_by_the_rounds_before_and_clipped():
    normal = run({**MODEL, "normalize": True, "clip": 1.2})
    first = paid(*SCORES)
    raw = torch.tensor([one[0] for one in SCORES], dtype=torch.float64)
    own = (raw - raw.mean()) / raw.std(unbiased=False)
    assert worth_of(first, IDS, normal).tolist() == pytest.approx(own.clamp(-1.2, 1.2).tolist())
    memory = remembered(first, IDS, normal, NOTHING)
    second = paid((9.0,), (1.0,), (math.nan,), (2.0,))
    wanted = (torch.tensor([9.0, 1.0, 2.0, 2.0]).double() - raw.mean()) / raw.std(unbiased=False)
    assert worth_of(second, IDS, normal, memory).tolist() == pytest.approx(wanted.clamp(-1.2, 1.2).tolist())
    both = torch.cat([raw, torch.tensor([9.0, 1.0, 2.0]).double()])
    (moments,) = remembered(second, IDS, normal, memory).moments
    assert moments.count == 7
    assert moments.mean == pytest.approx(both.mean().item())
    assert moments.deviation == pytest.approx(both.std(unbiased=False).item())


def test_what_has_no_reward_is_neither_praised_nor_blamed():
    one = run(MODEL)
    nan = math.nan
    assert worth_of(paid((3.0,), (nan,), (nan,), (nan,)), IDS, one).tolist() == [3.0] * 4
    assert worth_of(paid((nan,), (nan,), (nan,), (nan,)), IDS, one).tolist() == [0.0] * 4
    found, means = credit(paid((3.0,), (nan,), (2.0,), (0.0,)), [0, 0, 1, 1], one)
    assert [parts.advantages[0] for parts in found] == [0.0, 0.0, 2.0, -2.0]
    assert means["reward"] == pytest.approx(8 / 4)


@pytest.mark.parametrize(("truncated", "counts"), [("left_out", False), ("masked", True)])
def test_what_earns_nothing_moves_no_statistics(truncated, counts):
    """A cut answer that is left out: neither scale nor threshold, nor what stands for a missing reward, knows of it."""
    stated = {"reward": "ppo_c", "confidence": "stated", "decoupled": False}
    one = run({**MODEL, "normalize": True}, **stated, truncated=truncated)
    given = paid((3.0,), (math.nan,), (0.5,), (1.5,))
    for wild in (100.0, -7.0):
        cut = replace(given[0], finished=False, rewards=(wild,))
        memory = remembered([*given, cut], torch.tensor([*IDS.tolist(), 0]), one, NOTHING)
        without = remembered(given, IDS, one, NOTHING)
        assert ((memory.moments, memory.threshold) != (without.moments, without.threshold)) == counts
        credited, _ = credit([*given, cut], [*IDS.tolist(), 0], one)
        plain, _ = credit(given, IDS.tolist(), one)
        assert (credited[:4] != plain) == counts
    nobody = [replace(cut, finished=False) for cut in given]
    if not counts:
        assert remembered(nobody, IDS, one, NOTHING).threshold is None


def test_ppo_c_judges_a_round_by_the_threshold_of_those_before():
    stated = {"reward": "ppo_c", "confidence": "stated", "decoupled": False}
    given = paid(*SCORES)
    for form, first in (
        ("proper", 3.0 - 0.5 * (0.9 - 1) ** 2),
        ("threshold", 3.0 + 0.5 * 3.0 * 0.4),
        ("difference", 3.0 + 0.5 * 2.0 * 0.4),
    ):
        one = run(MODEL, **stated, ppo_c={"form": form})
        assert rewards_of(given, IDS, one)[0, 0].item() == pytest.approx(first)  # the mean of its own round is 1
        memory = remembered(given, IDS, one, NOTHING)
        assert memory.threshold == 1.0
        later = remembered(paid((5.0,), (5.0,), (5.0,), (5.0,)), IDS, one, memory)
        assert later.threshold == pytest.approx(0.9 * 1.0 + 0.1 * 5.0)
    high = run(MODEL, **stated, ppo_c={"scale": 2.0})
    target = 1 / (1 + math.exp(-2.0 * 2.0))
    assert rewards_of(given, IDS, high)[0, 0].item() == pytest.approx(3.0 - 0.5 * (0.9 - target) ** 2)
    silent = [replace(given[0], confidence=math.nan), *given[1:]]
    assert rewards_of(silent, IDS, run(MODEL, **stated))[0, 0].item() == pytest.approx(3.0 - 1.0)
    published = run(MODEL, **stated, ppo_c={"form": "threshold"})
    assert rewards_of(silent, IDS, published)[0, 0].item() == pytest.approx(3.0)
    apart = run(MODEL, objective="grpo", reward="ppo_c", confidence="stated")
    answers, shifts = rewards_of(given, IDS, apart)
    assert answers.tolist() == [3.0, -1.0, 0.5, 1.5]
    assert shifts.tolist() == pytest.approx([-0.5 * (q - t) ** 2 for q, t in ((0.9, 1), (0.6, 0), (0.1, 0), (0.5, 1))])


def test_a_score_stands_beside_whatever_an_answer_earns():
    one = run(MODEL, objective="grpo", reward="brier", confidence="stated", accuracy_weight=0.5)
    answers, scores = rewards_of(paid(*SCORES), IDS, one)
    assert answers.tolist() == [1.5, -0.5, 0.25, 0.75]
    assert scores.tolist() == pytest.approx([-0.01, -0.36, -0.81, -0.25])
    likely = run(MODEL, reward="log", accuracy_weight=0.5)
    assert rewards_of(paid(*SCORES), IDS, likely)[0].tolist() == [1.5, -0.5, 0.25, 0.75]
    priced = run(MODEL, {"kind": "grade", "weight": 2.0}, reward="ternary")
    assert worth_of(paid(*SCORES), IDS, priced).tolist() == [5.0, -1.0 - 8.0, 2.5, 1.5 - 8.0]


STATED = {"confidence": "stated", "decoupled": False}


@pytest.mark.parametrize(
    ("sources", "rollouts", "message"),
    [
        ([MODEL], {"reward": "brier", **STATED}, "the grade alone is sure to pay for being right, by 0 here"),
        ([MODEL, {"kind": "grade", "weight": 0.5}], {"reward": "brier", **STATED}, "by 0.5 here"),
        ([{"kind": "grade", "clip": 0.5}], {"reward": "brier", **STATED}, "by 0.5 here"),
        ([{"kind": "grade", "weight": 0.4}], {"reward": "ppo_c", **STATED}, "wrong on purpose"),
    ],
)
def test_mixtures_that_pay_for_being_wrong_are_errors(sources, rollouts, message):
    with pytest.raises(UserError, match=message):
        check_rewards(run(*sources, **rollouts))


@pytest.mark.parametrize(
    ("sources", "rollouts"),
    [
        ([MODEL, {"kind": "grade"}], {"reward": "brier", **STATED}),
        ([{"kind": "grade", "normalize": True, "clip": 1.0}], {"reward": "brier", **STATED}),
        ([MODEL], {"reward": "ppo_c", **STATED}),
        ([MODEL], {"confidence": "stated"}),  # PPO-M
    ],
)
def test_mixtures_that_do_not_are_none(sources, rollouts):
    check_rewards(run(*sources, **rollouts))


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ({"reward": "model"}, "needs reward_model"),
        ({"reward": "sources"}, "needs sources"),
        ({"sources": []}, "at least 1"),
        ({"reward": "accuracy", "reward_model": "x"}, "leave out reward_model"),
        ({"sources": [MODEL], "reward_model": "x"}, "short for one of the sources"),
        ({"reward": "ppo_c", "reward_model": "x"}, "confidence: stated"),
        ({"reward": "brier", "reward_model": "x"}, "unless accuracy_weight is above 0"),
        ({"reward": "ternary", "reward_model": "x"}, "kind grade, as it is"),
        ({"reward": "ternary", "sources": [{"kind": "grade", "clip": 1.0}]}, "kind grade, as it is"),
        ({"sources": [{"kind": "format", "pattern": "("}]}, "no regular expression"),
        ({"sources": [{"kind": "length", "free": 4, "full": 4}]}, "must be below full"),
        ({"reward_model": "x", "ppo_c": {"form": "threshold", "scale": 2.0}}, "form: proper"),
        ({"reward_model": "x", "accuracy_weight": 1.0}, "weigh a source of kind grade"),
        ({"reward_model": "x", "format_penalty": -3.0}, "take a source of kind format"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(rollouts, message):
    with pytest.raises(ValueError, match=message):
        config("rloo", rollouts=rollouts)


@pytest.mark.parametrize("clip", [None, 0.3, 1.0, 1.5])
def test_a_grade_is_never_worth_less_than_it_says(clip):
    """Whatever the share of right answers so far, 0 and 1 among them."""
    settings = run({"kind": "grade", "normalize": True, "clip": clip})
    gaps = []
    for right in range(21):
        memory = Memory(moments=(Moments().with_values(torch.tensor([1.0] * right + [0.0] * (20 - right))),))
        worth = worth_of(paid(correct=(1, 0, 1, 0)), IDS, settings, memory)
        gaps.append((worth[0] - worth[1]).item())
    (grade,) = settings.rollouts.paid_by
    assert min(gaps) >= grade.least_of_right - 1e-9


def test_names_tell_sources_of_a_kind_apart():
    assert source_names(run(MODEL, {"kind": "grade"}, MODEL).rollouts.paid_by) == ["model_1", "grade", "model_2"]


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() + 1e6
    parts = Moments().with_values(values[:7]).with_values(torch.tensor([math.nan])).with_values(values[7:])
    assert parts.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert parts.deviation == pytest.approx(values.std(unbiased=False).item(), rel=1e-6)
    assert Moments().with_values(torch.full((3,), 2.0)).deviation == 1.0


def test_a_reward_that_rises_while_right_answers_fall_is_told_once(caplog):
    """Only where both are clear over the rounds watched."""
    assert slope_t([1.0, 2.0, 3.0, 4.0]) == math.inf
    assert slope_t([2.0] * 5) == 0.0
    rising, falling = (
        tuple(float(i) + 0.1 * (-1) ** i for i in range(WATCHED[0])),
        tuple(0.9 - 0.1 * i for i in range(WATCHED[0])),
    )
    assert Memory(proxy=rising, correct=falling).over_optimised
    assert not Memory(proxy=rising, correct=(0.5, 0.4) * (WATCHED[0] // 2)).over_optimised
    assert not Memory(proxy=rising[1:], correct=falling[1:]).over_optimised
    one = run(MODEL)
    memory = NOTHING
    for i in range(WATCHED[0]):
        grades = [1] * (4 - i // 2) + [0] * (i // 2)
        memory = remembered(paid(*[(float(i),)] * 4, correct=grades[:4]), IDS, one, memory)
    assert memory.warned
    assert Memory.loaded(json.loads(json.dumps(memory.state_dict()))) == memory


def test_what_creeps_is_seen_in_more_rounds():
    """A real run of PPO on a weak reward model, held by its KL: in any eight rounds its grades are noise."""
    proxy = (
        0.17,
        0.1,
        0.5,
        0.84,
        0.75,
        0.49,
        0.79,
        1.1,
        0.28,
        1.14,
        0.75,
        0.79,
        0.96,
        0.98,
        0.88,
        1.07,
        0.9,
        1.09,
        1.24,
        1.48,
        0.83,
        0.88,
        1.26,
        1.26,
        1.65,
        1.53,
        1.24,
        1.41,
        1.68,
        1.54,
        1.53,
        1.49,
    )
    correct = (
        0.33,
        0.42,
        0.22,
        0.47,
        0.33,
        0.28,
        0.2,
        0.59,
        0.36,
        0.52,
        0.45,
        0.22,
        0.16,
        0.39,
        0.03,
        0.27,
        0.23,
        0.52,
        0.25,
        0.48,
        0.52,
        0.23,
        0.09,
        0.16,
        0.59,
        0.28,
        0.2,
        0,
        0.17,
        0,
        0.14,
        0.02,
    )
    assert all(not Memory(proxy=proxy[:n][-8:], correct=correct[:n][-8:]).over_optimised for n in range(8, 33))
    assert Memory(proxy=proxy, correct=correct).over_optimised == 16
    assert not Memory(proxy=correct, correct=proxy).over_optimised


def test_auroc_counts_every_score_apart():
    scores = torch.tensor([1e-9, 2e-9, 3e-9, 3e-9, math.nan])
    grades = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    assert score_auroc(scores, grades) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert math.isnan(score_auroc(scores, torch.ones(5)))


@pytest.mark.parametrize(
    ("rollouts", "key"),
    [
        ({"reward": "accuracy", "accuracy_weight": 5.0}, "accuracy_weight"),
        ({"reward": "ternary", "score_weight": 3.0}, "score_weight"),
        ({"reward": "accuracy", "score_weight": 3.0}, "score_weight"),
        ({"reward": "brier", "format_penalty": -5.0}, "format_penalty"),
        ({"reward": "accuracy", "confidence": "stated", "format_penalty": -5.0}, "format_penalty"),
        ({"reward": "brier", "target_mixing": 0.5}, "target_mixing"),
        ({"reward": "brier", "confidence": "stated", "decoupled": False, "target_mixing": 0.5}, "target_mixing"),
        ({"reward": "brier", "abstentions": ["dunno"]}, "abstentions"),
        ({"reward": "accuracy", "ppo_c": {"weight": 3.0}}, "ppo_c"),
    ],
)
def test_what_would_change_nothing_is_refused_by_name(rollouts, key):
    with pytest.raises(ValidationError, match=rf"{key} goes with .* it changes nothing: leave it out"):
        RolloutsConfig.model_validate(rollouts)


@pytest.mark.parametrize(
    "rollouts",
    [
        {"reward": "log", "accuracy_weight": 0.5, "score_weight": 0.5},
        {"reward": "brier", "confidence": "stated", "target_mixing": 0.5, "format_penalty": -1.0},
        {"reward": "ternary", "abstentions": ["dunno"]},
        {
            "reward": "ppo_c",
            "reward_model": "m",
            "confidence": "stated",
            "ppo_c": {"form": "proper"},
            "format_penalty": -1.0,
        },
    ],
)
def test_what_is_read_may_be_set_and_a_written_config_reads_again(rollouts):
    config = RolloutsConfig.model_validate(rollouts)
    assert RolloutsConfig.model_validate(config.model_dump(mode="json")) == config

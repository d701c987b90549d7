import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from calibtrain.abstention.certificate import certify, minimum_answers
from calibtrain.abstention.groups import certify_groups
from calibtrain.abstention.hallucination import HallucinationCertificate, allowed_errors, control_hallucinations
from calibtrain.errors import UserError

PAIRS = st.lists(st.tuples(st.sampled_from([0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=80)


@pytest.mark.parametrize("delta", [None, 0.1])
@settings(max_examples=60)
@given(PAIRS)
def test_the_threshold_is_the_lowest_that_is_allowed(delta, pairs):
    q, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    found = control_hallucinations(q, y, 0.25, delta)
    allowed = allowed_errors(len(q), 0.25, delta)
    if found is None:
        assert allowed < 0
        return
    answered = q >= found.threshold
    assert (found.n_answered, found.n_wrong) == (answered.sum(), (answered & ~y).sum())
    assert found.n_wrong <= allowed
    lower = q[q < found.threshold]
    if len(lower):  # answering the next ones too would be wrong too often
        assert ((q >= lower.max()) & ~y).sum() > allowed
    assert HallucinationCertificate.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(("n", "rate"), [(9, 0.1), (10, 0.1), (29, 0.1), (300, 0.07), (1000, 0.2), (59, 0.05)])
def test_allowed_errors_are_the_formulas_largest(n, rate):
    m = allowed_errors(n, rate)
    assert m < 0 or (m + 1) / (n + 1) <= rate + 1e-12
    assert (m + 2) / (n + 1) > rate
    m = allowed_errors(n, rate, 0.05)
    assert m < 0 or binom.cdf(m, n, rate) <= 0.05
    assert binom.cdf(m + 1, n, rate) > 0.05


def test_none_where_too_few_answers_can_show_anything():
    assert control_hallucinations([0.9] * 8, [1] * 8, 0.1) is None
    assert control_hallucinations([0.9] * 9, [1] * 9, 0.1).threshold == 0.0
    assert control_hallucinations([], [], 0.1) is None
    assert control_hallucinations([0.9] * 58, [1] * 58, 0.05, 0.05) is None
    assert control_hallucinations([0.9] * 59, [1] * 59, 0.05, 0.05).n_wrong == 0
    all_wrong = control_hallucinations(np.ones(50), np.zeros(50), 0.1)
    assert all_wrong.threshold > 1
    assert all_wrong.coverage == 0
    with pytest.raises(UserError, match="0 or 1"):
        control_hallucinations([0.5], [0.5], 0.1)


def test_each_group_gets_its_own_threshold_at_its_share_of_delta():
    rng = np.random.default_rng(0)
    groups = np.repeat(["easy", "hard", "tiny"], [500, 500, 10])
    q = rng.random(1010)
    y = rng.random(1010) < np.where(groups == "hard", q**2, q**0.5)
    found = certify_groups(q, y, groups, 0.3, 0.05)
    assert found.share == 0.025  # the tiny group could never be certified and takes no share
    for name in ("easy", "hard"):
        assert found.groups[name] == certify(q[groups == name], y[groups == name], 0.3, 0.025)
    assert found.groups["hard"].certificate.threshold > found.groups["easy"].certificate.threshold
    assert found.groups["tiny"].certificate is None
    assert "10 graded answers" in found.groups["tiny"].reason
    at = found.groups["easy"].certificate.threshold
    assert found.answers([at, at, 1.0, 1.0], ["easy", "hard", "tiny", "new"]).tolist() == [True, False, False, False]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=8))
def test_the_shares_never_add_up_to_more_than_delta(sizes):
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    found = certify_groups(np.full(len(groups), 0.5), np.ones(len(groups)), groups, 0.1, 0.05)
    certified = [one.certificate for one in found.groups.values() if one.certificate]
    assert all(one.delta == found.share for one in certified)
    assert sum(one.delta for one in certified) <= 0.05 + 1e-12
    able = sorted(sizes, reverse=True)
    most = max((m for m in range(1, len(sizes) + 1) if able[m - 1] >= minimum_answers(0.1, 0.05 / m)), default=0)
    assert len(certified) == most


def test_groups_are_one_per_answer():
    with pytest.raises(UserError, match="one per answer"):
        certify_groups([0.5, 0.6], [1, 1], ["a"], 0.1, 0.05)
    with pytest.raises(UserError, match="one per answer"):
        certify_groups([0.5], [1], ["a"], 0.1, 0.05).answers([0.5], [])

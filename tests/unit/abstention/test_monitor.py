import json
import math

import numpy as np
import pytest

from calibtrain.abstention.monitor import (
    ODDS_RATIOS,
    RiskAlarm,
    hallucinations_saved,
    log_evidence,
    refusal_curve,
    risk_interval,
    start_capital,
    step,
)
from calibtrain.errors import UserError


def evidence_by_definition(wrong, risk):
    """The mixture over starts and odds, each product written out."""
    held = lambda t: 1 / math.log2(t + 2)  # noqa: E731
    total = held(len(wrong))
    for start in range(1, len(wrong) + 1):
        for ratio in ODDS_RATIOS:
            p = ratio * risk / (1 - risk + ratio * risk)
            product = np.prod([p / risk if x else (1 - p) / (1 - risk) for x in wrong[start - 1 :]])
            total += (held(start - 1) - held(start)) / len(ODDS_RATIOS) * product
    return total


def test_the_evidence_is_the_mixture_it_claims_to_be():
    wrong = np.random.default_rng(0).random(40) < 0.4
    capital = start_capital()
    for t, one in enumerate(wrong, 1):
        capital = step(capital, t, np.asarray(one), 0.2)
        assert log_evidence(capital, t) == pytest.approx(math.log(evidence_by_definition(wrong[:t], 0.2)), abs=1e-9)


@pytest.mark.parametrize("risk", [0.05, 0.2, 0.5])
def test_no_bet_gains_on_average_at_the_certified_risk_or_below(risk):
    capital = np.log(np.random.default_rng(1).random((1, len(ODDS_RATIOS))) / 20)
    now = math.exp(log_evidence(capital, 7)[0])
    after = [math.exp(log_evidence(step(capital, 8, np.array([one]), risk), 8)[0]) for one in (False, True)]
    assert (1 - risk) * after[0] + risk * after[1] == pytest.approx(now, rel=1e-12)
    assert after[1] > after[0]  # so that below the risk it loses


def test_it_fires_after_a_late_shift_and_stays_fired():
    rng = np.random.default_rng(2)
    alarm = RiskAlarm(0.1, 0.05)
    assert not alarm.observe_all(rng.random(3000) < 0.08)
    assert alarm.p_value > 0.05
    assert alarm.observe_all(rng.random(600) < 0.3)
    assert 3000 < alarm.fired_at < 3200
    assert alarm.observe_all([False] * 500)
    assert alarm.p_value <= 0.05


def test_state_survives_json_exactly():
    wrong = np.random.default_rng(3).random(300) < 0.2
    whole, first = RiskAlarm(0.1), RiskAlarm(0.1)
    whole.observe_all(wrong)
    first.observe_all(wrong[:77])
    json.loads(first.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    resumed = RiskAlarm.from_json(first.to_json())
    resumed.observe_all(wrong[77:])
    assert resumed.as_dict() == whole.as_dict()
    assert RiskAlarm.from_json(RiskAlarm(0.1).to_json()).as_dict() == RiskAlarm(0.1).as_dict()
    broken = json.loads(whole.to_json()) | {"log_capital": [0.0]}
    for text in ("{", "[]", "{}", json.dumps(broken)):
        with pytest.raises(UserError, match="start a new alarm"):
            RiskAlarm.from_json(text)


def test_bad_arguments_are_refused():
    for values, message in (((0.0, 0.05), "target_risk"), ((0.1, 1.0), "delta")):
        with pytest.raises(UserError, match=message):
            RiskAlarm(*values)
    with pytest.raises(UserError, match="NaN"):
        RiskAlarm(0.1).observe(math.nan)
    for bad in ((-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)):
        with pytest.raises(UserError, match="risk interval"):
            risk_interval(*bad)


@pytest.mark.parametrize(("wrong", "n"), [(0, 20), (20, 20), (3, 40), (1, 1), (500, 5000)])
def test_confidence_sequence_is_where_the_mixture_does_not_refute(wrong, n):
    from scipy.special import betaln

    low, high = risk_interval(wrong, n)
    assert 0 <= low <= wrong / n <= high <= 1
    for p in np.linspace(0.001, 0.999, 500):
        log_ratio = betaln(1 + wrong, 1 + n - wrong) - wrong * math.log(p) - (n - wrong) * math.log1p(-p)
        if abs(log_ratio - math.log(20)) > 1e-6:
            assert (log_ratio < math.log(20)) == (low < p < high)
    assert risk_interval(0, 0) == (0.0, 1.0)


def test_confidence_sequence_covers_at_all_times_at_once():
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(60):
        wrong = np.cumsum(rng.random(400) < 0.15)
        missed += any(
            not low <= 0.15 <= high for low, high in (risk_interval(int(wrong[n]), n + 1) for n in range(0, 400, 5))
        )
    assert missed <= 9  # binomial(60, 0.05) exceeds 9 less than once in 1,000


def test_refusals_against_hallucinations():
    q, y = np.array([0.9, 0.8, 0.8, 0.2]), np.array([1, 0, 1, 0])
    rows = refusal_curve(q, y, [0.0, 0.5, 0.85])
    assert [(r.refusal_rate, r.hallucination_rate) for r in rows] == [(0, 0.5), (0.25, 0.25), (0.75, 0.0)]
    # A threshold that refuses a quarter leaves a quarter of the questions answered wrongly.
    assert hallucinations_saved(q, y, refused=25, hallucinated=25, n=100) == pytest.approx(0)
    assert hallucinations_saved(q, y, refused=25, hallucinated=10, n=100) == pytest.approx(0.15)
    assert hallucinations_saved(q, y, refused=50, hallucinated=10, n=100) == pytest.approx(
        0.125 - 0.1
    )  # within the tie
    with pytest.raises(UserError, match="add up"):
        hallucinations_saved(q, y, refused=60, hallucinated=60, n=100)

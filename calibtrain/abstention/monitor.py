"""What abstention does, watched: refusals against hallucinations in evaluation, and an alarm in service.

The alarm watches audited answers, a random sample of those given, each wrong or right. Under the null hypothesis that
the chance of a wrong one is at most the certified risk r, whatever came before, every bet on "wrong" that pays
p / r for a wrong answer and (1 - p) / (1 - r) for a right one, p > r, loses on average: the capital of a gambler who
starts with 1 exceeds 1 / delta, ever, with probability at most delta (Ville 1939). So the alarm may be looked at
after every answer, forever, and is false with probability at most delta.

A shift may come late, after a long time in which one gambler would have lost everything. So the capital is spread over
gamblers who start at every answer and over several p (a mixture over change points, as in Shin, Ramdas, Rinaldo 2022,
arXiv 2203.03532, here with shares that sum to 1, which bounds the chance of a false alarm and not only the mean time
to one). All who hold the same p share one account, so memory does not grow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, logsumexp

from calibtrain.abstention.policy import SelectiveStatistics, selective_statistics
from calibtrain.errors import UserError

Array = NDArray[np.float64]
ODDS_RATIOS = (1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 6.0, 10.0, 20.0)
"""The gamblers' p, as odds of a wrong answer over the odds at the certified risk."""


class RiskAlarm:
    """Alarm that a certified risk (or hallucination rate) no longer holds, false with probability at most `delta`, ever.

    Feed it every audited answer, in order; which answers are audited must not depend on whether they are right. Once
    fired it stays fired: certify again, then start a new alarm.

    Args:
        target_risk: the certified share of wrong answers, between 0 and 1.
        delta: largest chance of a false alarm.
    """

    def __init__(self, target_risk: float, delta: float = 0.05) -> None:
        for name, value in {"target_risk": target_risk, "delta": delta}.items():
            if not 0 < value < 1:
                raise UserError(f"alarm: {name} must lie strictly between 0 and 1, got {value}")
        self.target_risk = target_risk
        self.delta = delta
        self.n = 0
        self.n_wrong = 0
        self.fired_at: int | None = None  # after so many audited answers
        self._log_capital = start_capital()
        self._largest = 0.0  # of log evidence

    def observe(self, wrong: bool) -> bool:
        """Take one audited answer; True when the alarm has fired, now or before."""
        if isinstance(wrong, float) and math.isnan(wrong):
            raise UserError("alarm: an audited answer is neither right nor wrong (NaN); leave ungraded answers out")
        self.n += 1
        self.n_wrong += bool(wrong)
        self._log_capital = step(self._log_capital, self.n, np.asarray(bool(wrong)), self.target_risk)
        self._largest = max(self._largest, float(log_evidence(self._log_capital, self.n)))
        if self.fired_at is None and self._largest >= -math.log(self.delta):
            self.fired_at = self.n
        return self.fired

    def observe_all(self, wrong: Iterable[bool]) -> bool:
        """Take audited answers in their order; True when the alarm has fired, now or before."""
        for one in wrong:
            self.observe(one)
        return self.fired

    @property
    def fired(self) -> bool:
        """Whether the alarm has fired."""
        return self.fired_at is not None

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value of "the certificate holds": below any x, ever, with probability at most x."""
        return math.exp(-self._largest)

    def risk_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence sequence of the share of wrong answers: all intervals ever shown hold together at `level`.

        For answers of one constant risk; after a shift it is about the mean so far.
        """
        return risk_interval(self.n_wrong, self.n, level)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the whole state."""
        return {
            "target_risk": self.target_risk,
            "delta": self.delta,
            "n": self.n,
            "n_wrong": self.n_wrong,
            "fired_at": self.fired_at,
            "largest_log_evidence": self._largest,
            # -inf, before the first answer, has no JSON.
            "log_capital": [None if math.isinf(value) else value for value in self._log_capital.tolist()],
        }

    def to_json(self) -> str:
        """JSON text that `from_json` reads; the alarm goes on as if it had never stopped."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RiskAlarm:
        """Alarm of `to_json()` text; UserError for anything else."""
        try:
            values = json.loads(text)
            alarm = cls(values["target_risk"], values["delta"])
            alarm.n, alarm.n_wrong, alarm.fired_at = values["n"], values["n_wrong"], values["fired_at"]
            alarm._largest = float(values["largest_log_evidence"])
            capital = [-math.inf if value is None else float(value) for value in values["log_capital"]]
            sound = (
                all(type(one) is int for one in (alarm.n, alarm.n_wrong))
                and 0 <= alarm.n_wrong <= alarm.n
                and (alarm.fired_at is None or 0 < alarm.fired_at <= alarm.n)
                and 0 <= alarm._largest < math.inf
                and not any(math.isnan(value) or value == math.inf for value in capital)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"alarm: its state cannot be read ({error}); start a new alarm") from error
        if not sound:  # a NaN would never reach the bound
            raise UserError("alarm: its state holds impossible numbers; start a new alarm")
        if len(capital) != len(ODDS_RATIOS):
            raise UserError(f"alarm: state of {len(capital)} accounts, expected {len(ODDS_RATIOS)}; start a new alarm")
        alarm._log_capital = np.array(capital)
        return alarm


def start_capital(streams: Sequence[int] = ()) -> Array:
    """Log capital (*streams, accounts) of the gamblers before the first answer: none has started."""
    return np.full((*streams, len(ODDS_RATIOS)), -np.inf)


def step(log_capital: Array, t: int, wrong: NDArray[np.bool_], target_risk: float) -> Array:
    """Log capital (*streams, accounts) after the t-th answer (t >= 1) of each stream; wrong (*streams,) bool.

    Of the starting capital a share of held(t - 1) - held(t) is staked for the first time at answer t.
    """
    ratio = np.array(ODDS_RATIOS)
    chance = ratio * target_risk / (1 - target_risk + ratio * target_risk)
    staked = math.log(_held(t - 1) - _held(t)) - math.log(len(ratio))
    pays = np.where(
        np.asarray(wrong)[..., None], np.log(chance / target_risk), np.log((1 - chance) / (1 - target_risk))
    )
    return np.logaddexp(log_capital, staked) + pays


def log_evidence(log_capital: Array, t: int) -> Array:
    """Log of the whole capital (*streams,) after t answers: of all accounts and of what was not staked yet."""
    return np.logaddexp(logsumexp(log_capital, axis=-1), math.log(_held(t)))


def risk_interval(wrong: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence sequence of a share at `wrong` of `n` (Robbins 1970, Beta(1, 1) mixture): valid at all n at once."""
    if not 0 <= wrong <= n or not 0 < level < 1:
        raise UserError(f"risk interval: {wrong} wrong of {n} at level {level}")
    if n == 0:
        return 0.0, 1.0
    right, limit = n - wrong, -math.log(1 - level)
    mixture = float(betaln(1 + wrong, 1 + right))

    def excess(p: float) -> float:
        return mixture - wrong * math.log(p) - right * math.log1p(-p) - limit

    best, edge = wrong / n, 1e-12
    inside = min(max(best, edge), 1 - edge)
    low = 0.0 if wrong == 0 or excess(edge) <= 0 else float(scipy.optimize.brentq(excess, edge, inside))
    high = 1.0 if right == 0 or excess(1 - edge) <= 0 else float(scipy.optimize.brentq(excess, inside, 1 - edge))
    return low, high


def refusal_curve(confidence: ArrayLike, correct: ArrayLike, thresholds: Sequence[float]) -> list[SelectiveStatistics]:
    """Refusals against hallucinations of forced answers, one point for each threshold: what abstention can trade."""
    return [selective_statistics(confidence, correct, threshold) for threshold in thresholds]


def hallucinations_saved(confidence: ArrayLike, correct: ArrayLike, refused: int, hallucinated: int, n: int) -> float:
    """Hallucination rate of a threshold that refuses as often, minus that of the system: above 0 the system is better.

    confidence, correct (m,): forced answers to the questions; refused, hallucinated: of n questions by a system with its
    own way to refuse (a trained refusal, other thresholds). Answers of equal confidence are refused in equal shares, so
    every refusal rate is matched exactly. Raises UserError for counts that are no shares of n.
    """
    q, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64) > 0
    if n < 1 or refused < 0 or hallucinated < 0 or refused + hallucinated > n or q.shape != y.shape or not len(q):
        raise UserError(
            f"refusals: {refused} refused and {hallucinated} wrong of {n}, against {q.size} forced answers; "
            "give counts that add up to at most n, and graded answers"
        )
    values, place = np.unique(q, return_inverse=True)
    # From the most confident down: the share of questions answered, and of those answered wrongly.
    answered = np.append(0, np.cumsum(np.bincount(place, minlength=len(values))[::-1])) / len(q)
    wrong = np.append(0, np.cumsum(np.bincount(place, ~y, minlength=len(values))[::-1])) / len(q)
    return float(np.interp(1 - refused / n, answered, wrong)) - hallucinated / n


def _held(t: int) -> float:
    """Share of the starting capital not staked by answer t: falls so slowly that a late shift still finds some."""
    return 1 / math.log2(t + 2)

"""A threshold's risk in each group of questions: a promise kept over all of them together may be broken in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibtrain.abstention.policy import policy
from calibtrain.calibration.intervals import clopper_pearson
from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class GroupRisk:
    """What a threshold did to the graded answers of one group."""

    key: str  # "continent"
    value: str  # "Africa"
    n: int  # graded answers
    n_answered: int
    n_wrong: int  # of the answered
    low: float  # Clopper-Pearson interval of the risk; all groups' intervals hold together at 95%
    high: float
    breaks: bool  # the whole interval lies above the promised risk

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GroupRisk:
        """Of `as_dict()` values; UserError for other keys."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"group: expected the keys {sorted(names)}; run `calibtrain calibrate` again")
        return cls(**values)


def group_risks(
    confidence: ArrayLike,
    correct: ArrayLike,
    strata: Sequence[Mapping[str, str]],
    threshold: float,
    target_risk: float,
    level: float = 0.95,
) -> list[GroupRisk]:
    """The risk of answering iff confidence >= threshold in every group that the strata name, the worst first.

    confidence, correct (n,) and strata (n,): graded answers. A group "breaks" the promise where its interval, widened so
    that all groups' hold together at `level`, lies above target_risk: of a system that keeps to it everywhere one group or
    more is called so with probability at most 1 - level.
    """
    answered, wrong = policy(confidence, threshold), np.asarray(correct, dtype=np.float64) <= 0
    if not len(answered) == len(wrong) == len(strata):
        raise UserError(f"strata: {len(answered)} confidences, {len(wrong)} grades and {len(strata)} strata")
    members: dict[tuple[str, str], list[int]] = {}
    for index, one in enumerate(strata):
        for pair in one.items():
            members.setdefault(pair, []).append(index)
    tested = sum(bool(answered[indices].any()) for indices in members.values())
    interval = lru_cache(None)(clopper_pearson)  # many small groups have the same counts
    found = []
    for (key, value), indices in members.items():
        given, mistaken = int(answered[indices].sum()), int((answered & wrong)[indices].sum())
        low, high = interval(mistaken, given, 1 - (1 - level) / max(tested, 1))
        found.append(GroupRisk(key, value, len(indices), given, mistaken, low, high, low > target_risk))
    return sorted(found, key=lambda one: (-one.breaks, -one.n_wrong / max(one.n_answered, 1), one.key, one.value))

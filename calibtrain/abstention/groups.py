"""One certified threshold for each group of questions, all of which hold together.

Each group's threshold is certified at delta divided by the number of groups (Bonferroni), so that with probability
1 - delta every group's risk is at most the target. A group with too few answers to certify anything even without an
error takes no share of delta; how many answers a group has is known without looking at a grade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.abstention.certificate import Certification, certify, checked_answers, minimum_answers
from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class GroupCertification:
    """The outcome for every group, each at `share` of delta. A group without a certificate is not answered."""

    groups: Mapping[str, Certification]
    delta: float  # chance that any of the certificates is wrong
    share: float  # delta of each certificate
    by: str = ""  # stratum whose values are the groups

    def answers(self, confidence: ArrayLike, groups: Sequence[str]) -> NDArray[np.bool_]:
        """True (n,) where the model should answer; never in a group that is unknown or has no certificate."""
        q = np.asarray(confidence, dtype=np.float64)
        if len(q) != len(groups):
            raise UserError(f"groups: {len(q)} confidences and {len(groups)} groups; give one per answer")
        limits = {name: one.certificate.threshold for name, one in self.groups.items() if one.certificate is not None}
        return q >= np.array([limits.get(name, np.inf) for name in groups], dtype=np.float64)


def certify_groups(
    confidence: ArrayLike, correct: ArrayLike, groups: Sequence[str], target_risk: float, delta: float
) -> GroupCertification:
    """Certify a threshold in every group so that with probability 1 - delta all of them hold.

    confidence (n,) in [0, 1], correct (n,) bool or 0/1, groups (n,): the grouping is fixed without looking at the grades.
    Raises UserError for malformed input.
    """
    q, y = checked_answers(confidence, correct, target_risk, delta)
    if len(groups) != len(q):
        raise UserError(f"groups: {len(q)} answers and {len(groups)} groups; give one per answer")
    names, place = np.unique(np.array(list(groups), dtype=str), return_inverse=True)
    sizes = np.bincount(place, minlength=len(names))
    largest = np.argsort(-sizes, kind="stable")
    # As many groups share delta as could all be certified at that share.
    sharing = max(
        (m for m in range(1, len(names) + 1) if sizes[largest[m - 1]] >= minimum_answers(target_risk, delta / m)),
        default=0,
    )
    share = delta / max(sharing, 1)
    found: dict[str, Certification] = {}
    for rank, index in enumerate(largest.tolist()):
        mine, needed = place == index, minimum_answers(target_risk, share)
        found[str(names[index])] = (
            certify(q[mine], y[mine], target_risk, share)
            if rank < sharing
            else Certification(
                None, f"{sizes[index]} graded answers; its share of delta needs at least {needed} of them"
            )
        )
    return GroupCertification({name: found[name] for name in sorted(found)}, delta, share)

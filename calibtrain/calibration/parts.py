"""Calibrators of the parts of answers: one for each field that was graded often enough, one of all parts for the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.scores import Array, Scores, scores_of
from calibtrain.errors import UserError

METHOD = "platt"
"""Two numbers: a likelihood of a value is not its chance of being right, and single fields have few answers."""
QUESTIONS, OUTCOMES = 50, 10
"""A field has a calibrator of its own from so many questions, and so many of its parts right, and wrong, on."""
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class PartCalibrators:
    """Maps from the likelihood of a part to the chance that it is right, by its name."""

    pooled: Calibrator
    fields: Mapping[str, Calibrator]

    def apply(self, names: Sequence[str], likelihood: Scores | ArrayLike) -> Array:
        """Calibrated probabilities (N,) of parts with these names and likelihoods (N,)."""
        given = scores_of(likelihood)
        found = self.pooled.apply(given) if len(given) else np.zeros(0)
        fields = np.array([field_name(name) for name in names], dtype=object)
        for name, calibrator in self.fields.items():
            mine = np.flatnonzero(fields == name)
            if len(mine):
                found[mine] = calibrator.apply(given.take(mine))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "pooled": self.pooled.as_dict(),
            "fields": {name: calibrator.as_dict() for name, calibrator in self.fields.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, template_hash: str, weights_hash: str) -> PartCalibrators:
        """Of `as_dict()` values; UserError for others, and for those of another template or other weights."""
        if not isinstance(values, Mapping) or set(values) != {"pooled", "fields"}:
            raise UserError("calibrators of parts: expected `pooled` and `fields`; run `calibtrain calibrate` again")
        hashes = {"template_hash": template_hash, "weights_hash": weights_hash}
        fields = {str(name): Calibrator.from_dict(one, **hashes) for name, one in values["fields"].items()}
        return cls(Calibrator.from_dict(values["pooled"], **hashes), fields)


def fit_parts(
    names: Sequence[str],
    likelihood: Scores | ArrayLike,
    correct: ArrayLike,
    ids: ArrayLike,
    *,
    template_hash: str,
    weights_hash: str,
) -> PartCalibrators:
    """Calibrators of graded parts with these names, likelihoods and grades (N,), at least one.

    ids (N,): integers of the questions. Parts of one answer depend on each other, so the intervals come from resampling
    questions. Raises UserError as `fit_calibrator`.
    """
    given, y, key = scores_of(likelihood), np.asarray(correct, dtype=np.float64), np.asarray(ids)
    fields = np.array([field_name(name) for name in names], dtype=object)

    def fitted(rows: Any) -> Calibrator:
        return fit_calibrator(
            METHOD, given.take(rows), y[rows], ids=key[rows], template_hash=template_hash, weights_hash=weights_hash
        )

    found = {}
    for name in dict.fromkeys(fields):
        rows = np.flatnonzero(fields == name)
        right = int((y[rows] > 0).sum())
        if len(np.unique(key[rows])) >= QUESTIONS and min(right, len(rows) - right) >= OUTCOMES:
            found[str(name)] = fitted(rows)
    whole = np.arange(len(given))
    if len(found) == 1 and len(dict.fromkeys(fields)) == 1:  # claims: all parts are of one name
        return PartCalibrators(next(iter(found.values())), {})
    return PartCalibrators(fitted(whole), found)


def field_name(name: str) -> str:
    """Name of a part without its places in arrays, whose items are of one kind: stops[].name of stops[2].name."""
    return _INDEX.sub("[]", name)

"""Questions unlike those that were graded, told by the hidden state that the model answers from.

The score of a question is the Mahalanobis distance of its last token's final hidden state to those of the fitting questions,
under a covariance shrunk after Ledoit and Wolf 2004 (Lee et al. 2018, arXiv 1807.03888). Generation has that state already,
so a score costs no forward pass. Its rank among the scores of held-out questions is a conformal p-value: a question drawn as
they were is told to be outside with probability at most ALPHA, whatever the score is worth. `benchmarks/outside.py`
compares it with nearest neighbours (Sun et al. 2022, arXiv 2204.06507) and with other layers.
"""

from __future__ import annotations

import math
import os
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.features import Fingerprint
from calibtrain.errors import UserError

Array = NDArray[np.float64]
ALPHA = 0.05
"""Largest share of questions like the graded ones that are told to be unlike them."""
FEWEST = math.ceil(1 / ALPHA)
"""Held-out questions without which no p-value is below ALPHA."""


@dataclass(frozen=True, slots=True)
class Outside:
    """A fitted detector. Of the covariance the directions with variance are kept: n x H numbers, not H x H."""

    mean: NDArray[np.float32]  # (H,)
    directions: NDArray[np.float32]  # (R, H), orthonormal, R < n
    precision: NDArray[np.float32]  # (R,) one over the shrunk variance along each
    rest: float  # one over the shrunk variance along every other direction
    held_out: Array  # (N,) scores of held-out questions, ascending
    fingerprint: Fingerprint

    @property
    def n(self) -> int:
        """Held-out questions that the p-values rest on."""
        return len(self.held_out)

    def scores(self, states: NDArray[np.float32]) -> Array:
        """Squared Mahalanobis distances (N,) of states (N, H). UserError for another width."""
        if states.shape[1] != len(self.mean):
            raise UserError(f"outside: reads hidden states of width {len(self.mean)}, given {states.shape[1]}")
        centred = states.astype(np.float64) - self.mean
        along = centred @ self.directions.T.astype(np.float64)
        beside = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0.0)
        return np.asarray((along**2) @ self.precision.astype(np.float64) + self.rest * beside)

    def p_values(self, states: NDArray[np.float32]) -> Array:
        """Conformal p-values (N,): (1 + held-out scores at least as large) / (n + 1). A state that is not finite gets the
        smallest.
        """
        scores = np.nan_to_num(self.scores(states), nan=np.inf)
        larger = self.n - np.searchsorted(self.held_out, scores, side="left")
        return np.asarray((1 + larger) / (self.n + 1))

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in TENSORS}
        partial = path.with_name(path.name + ".partial")
        facts = {"weights_hash": self.fingerprint.weights_hash, "template_hash": self.fingerprint.template_hash}
        save_file({**tensors, "rest": np.array([self.rest])}, partial, metadata=facts)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, fingerprint: Fingerprint) -> Outside:
        """UserError where there is none that can be read, or one of other weights or another template."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                fitted = Fingerprint(facts["weights_hash"], facts["template_hash"])
                tensors = {name: file.get_tensor(name) for name in (*TENSORS, "rest")}
            mean, directions, precision = (tensors[name] for name in TENSORS[:3])
            if directions.shape != (len(precision), len(mean)) or tensors["held_out"].ndim != 1:
                raise ValueError("its arrays do not fit each other")
            found = cls(mean, directions, precision, float(tensors["rest"][0]), np.sort(tensors["held_out"]), fitted)
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run `calibtrain calibrate` again") from error
        for what, made, used in zip(("weights", "a template"), astuple(fitted), astuple(fingerprint), strict=True):
            if made != used:
                raise UserError(
                    f"{path}: made with {what} {made[:12]}, used with {used[:12]}; run `calibtrain calibrate` again"
                )
        return found


TENSORS = ("mean", "directions", "precision", "held_out")


def fit_outside(
    states: NDArray[np.float32], held_out: NDArray[np.float32], fingerprint: Fingerprint
) -> tuple[Outside | None, str]:
    """A detector of the fitting questions' states (N, H) and, to calibrate it, the held-out ones' (M, H).

    Held-out questions must not have fitted anything. None, and why, where p-values below ALPHA cannot come about.
    """
    if not states.size or not held_out.size:
        return None, "no hidden states of the graded questions are known"
    if len(held_out) < FEWEST:
        return None, f"{len(held_out)} held-out questions are too few, {FEWEST} are the least"
    wide = states.astype(np.float64)
    if len(wide) < 2 or not np.isfinite(wide).all() or not np.isfinite(held_out).all():
        return None, "the hidden states of the graded questions are too few, or not finite"
    from sklearn.covariance import ledoit_wolf_shrinkage

    mean = wide.mean(0)
    centred = wide - mean
    average = float((centred**2).mean())  # variance of a direction
    if average <= 1e-12 * max(1.0, float((mean**2).mean())):
        return None, "all graded questions have the same hidden state"
    shrinkage = float(np.clip(ledoit_wolf_shrinkage(centred, assume_centered=True), 1e-6, 1.0))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    variance = (1 - shrinkage) * singular[kept] ** 2 / len(wide) + shrinkage * average
    blank = Outside(
        mean.astype(np.float32),
        directions[kept].astype(np.float32),
        (1 / variance).astype(np.float32),
        1 / (shrinkage * average),
        np.zeros(0),
        fingerprint,
    )
    scores = np.sort(blank.scores(held_out))
    return Outside(blank.mean, blank.directions, blank.precision, blank.rest, scores, fingerprint), ""


def largest_share(n: int, delta: float) -> float:
    """Bound on the share of questions like the graded ones that a detector of `n` held-out ones tells to be outside.

    That share is random in the held-out questions, Beta distributed (Vovk 2012, arXiv 1209.2673), at most ALPHA on average;
    it is above the bound with probability at most delta.
    """
    from scipy.stats import beta

    fewer = math.ceil(ALPHA * (n + 1)) - 1  # p < ALPHA: score above all but fewer than this many held-out ones
    return float(beta.ppf(1 - delta, fewer, n + 1 - fewer)) if fewer > 0 else ALPHA

"""Calibrators fitted without grades: to a new share of right answers, or to the model that the tuned one came from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from calibtrain.calibration.calibrators import Calibrator, fit_targets
from calibtrain.calibration.maps import UNCLIPPED
from calibtrain.calibration.scores import Scores, scores_of
from calibtrain.calibration.shift import shift_between, target_accuracy
from calibtrain.errors import UserError


def fit_label_shift(
    calibrator: Calibrator, scores: Scores | ArrayLike, source_accuracy: float, *, level: float = 0.95
) -> Calibrator:
    """The calibrator with its probabilities moved to the accuracy that ungraded answers of new questions suggest.

    scores: of the new questions' answers (N,); source_accuracy: the share of right answers where `calibrator` was fitted.
    The interval is the profile likelihood's. Holds where right and wrong answers each look as they did at the source;
    128 graded answers test that and fit the shift themselves: `fit_calibrator("label_shift", calibrator.apply(...), ...)`.
    """
    probability = calibrator.apply(scores)
    best, low, high = target_accuracy(probability, source_accuracy, level)
    return Calibrator(
        method="label_shift",
        parameters={"shift": shift_between(source_accuracy, best), "accuracy": best, **UNCLIPPED},
        low={"shift": shift_between(source_accuracy, low), "accuracy": low},
        high={"shift": shift_between(source_accuracy, high), "accuracy": high},
        level=level,
        n=len(probability),
        nll_before=None,
        nll_after=None,
        template_hash=calibrator.template_hash,
        weights_hash=calibrator.weights_hash,
        after=calibrator,
    )


def fit_base_alignment(
    scores: Scores | ArrayLike,
    base_confidence: ArrayLike,
    agrees: ArrayLike,
    *,
    template_hash: str,
    weights_hash: str,
    ids: ArrayLike | None = None,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Calibrator:
    """Temperature at which a tuned model is as sure as the model it came from, where both give the same answer.

    After Luo, Wang, Li, Wei 2025 (arXiv 2505.16690): pre-trained models are the better calibrated, and where tuning
    changed the answer their confidence is about another one. Here the divergence is that of right from not right:
    KL(base || tuned) of the answers' likelihoods. scores: log-prob table (N, K) of the tuned model's answers;
    base_confidence (N,): the base model's likelihood of the same answers; agrees (N,) bool: the base model answers the
    same. No grades enter. Raises UserError where they never agree.
    """
    given = scores_of(scores)
    base, same = np.asarray(base_confidence, dtype=np.float64), np.asarray(agrees, dtype=bool)
    if base.shape != (len(given),) or same.shape != base.shape or not ((base >= 0) & (base <= 1)).all():
        raise UserError(f"base alignment: give a probability and whether it agrees for each of {len(given)} answers")
    rows = np.flatnonzero(same)
    if len(rows) == 0:
        raise UserError("base alignment: the two models never give the same answer; nothing to align on")
    return fit_targets(
        "base_alignment",
        given.take(rows),
        base[rows],
        template_hash=template_hash,
        weights_hash=weights_hash,
        ids=None if ids is None else np.asarray(ids)[rows],
        replicates=replicates,
        level=level,
        seed=seed,
    )

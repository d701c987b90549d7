"""Numbers behind the report: stages measured on the same questions, their comparison, and what each threshold does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.abstention.words import WORDS, Scale, word_for
from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.intervals import Interval, bootstrap, paired_bootstrap, sample_ids, wilson
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.answer import Answer

SLIDER_STEPS = 200


@dataclass(frozen=True, slots=True)
class Stage:
    """One model on the test questions: graded answers only, in question order."""

    label: str
    confidence: NDArray[np.float64]  # (n,)
    correct: NDArray[np.bool_]  # (n,)
    ids: NDArray[np.uint64]  # (n,)
    state: CalibrationState

    @property
    def n(self) -> int:
        """Graded answers."""
        return len(self.confidence)

    @property
    def accuracy(self) -> float:
        """Share right."""
        return metrics.accuracy(self.state)

    @property
    def mean_confidence(self) -> float:
        """Mean stated confidence."""
        return metrics.mean_confidence(self.state)


def stage_of(label: str, answers: Sequence[Answer], confidence: Sequence[float] | None) -> Stage:
    """Stage of the graded answers; `confidence` (one for each answer) replaces their own."""
    stated = [answer.confidence for answer in answers] if confidence is None else list(confidence)
    graded = [(a, q) for a, q in zip(answers, stated, strict=True) if a.correct is not None]
    q = np.array([q for _, q in graded], dtype=np.float64)
    y = np.array([bool(a.correct) for a, _ in graded], dtype=bool)
    ids = sample_ids(a.question_id for a, _ in graded)
    return Stage(label, q, y, ids, state_of(torch.from_numpy(q), torch.from_numpy(y)))


@dataclass(frozen=True, slots=True)
class Row:
    """One metric over the stages."""

    name: str
    hint: str
    percent: bool
    better: int  # 1: higher is better, -1: lower, 0: neither
    cells: Sequence[Interval]
    nulls: Sequence[float]  # beside each cell for ECE, else empty
    change: Interval | None  # last minus first, paired on the same questions


ROWS = (
    ("acc", "Accuracy", "share of all answers that are right", True, 1),
    ("mean_conf", "Mean stated confidence", "should equal the accuracy", True, 0),
    ("ece15", "Calibration error (ECE)", "mean gap between stated and real, 15 bins", True, -1),
    ("ece_debiased", "Calibration error above chance", "ECE minus what pure chance gives; 0 is perfect", True, -1),
    ("brier", "Brier score", "squared error of the confidence", False, -1),
    ("auroc", "AUROC", "how well confidence tells right from wrong; 0.5 is a coin", False, 1),
    ("aurc", "AURC", "mean share wrong over all thresholds", False, -1),
)


def comparison(stages: Sequence[Stage], replicates: int) -> list[Row]:
    """The metrics of all stages with 95% bootstrap intervals; empty without graded answers."""
    filled = [stage for stage in stages if stage.n]
    if not filled or len(filled) != len(stages):
        return []
    cells = [_within_range(bootstrap(_chosen, s.confidence, s.correct, s.ids, replicates=replicates)) for s in stages]
    nulls = [metrics.ece_null(stage.state) for stage in stages]
    first, last = stages[0], stages[-1]
    change: Mapping[str, Interval] = {}
    if len(stages) > 1 and np.array_equal(first.ids, last.ids):
        pair = ((s.confidence, s.correct) for s in (first, last))
        change = paired_bootstrap(_chosen, next(pair), next(pair), first.ids, replicates=replicates)
    return [
        Row(name, hint, percent, better, [c[key] for c in cells], nulls if key == "ece15" else [], change.get(key))
        for key, name, hint, percent, better in ROWS
    ]


def _within_range(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    """The same, but with no ECE below 0, where an interval that allows for noise may reach."""
    ece = intervals["ece15"]
    return {**intervals, "ece15": Interval(ece.estimate, max(ece.low, 0.0), ece.high)}


def threshold_table(stage: Stage, certified: float | None) -> dict[str, Any]:
    """What answering iff confidence >= threshold does, at thresholds from 0 to 1 and at the certified one.

    `rows` hold threshold, answered, wrong, low and high (Wilson 95% of wrong among answered); `certified` is the index
    of the certified threshold or None; `n` and `right` count all answers.
    """
    wanted = {round(i / SLIDER_STEPS, 6) for i in range(SLIDER_STEPS + 1)}
    thresholds = sorted(wanted | ({certified} if certified is not None else set()))
    order = np.sort(stage.confidence)
    wrong_order = np.sort(stage.confidence[~stage.correct])
    rows = []
    for threshold in thresholds:
        answered = stage.n - int(np.searchsorted(order, threshold, side="left"))
        wrong = len(wrong_order) - int(np.searchsorted(wrong_order, threshold, side="left"))
        low, high = wilson(wrong, answered)
        rows.append({"threshold": threshold, "answered": answered, "wrong": wrong, "low": low, "high": high})
    index = thresholds.index(certified) if certified is not None else None
    return {"n": stage.n, "right": int(stage.correct.sum()), "rows": rows, "certified": index}


def words_table(stage: Stage, scale: Scale = WORDS) -> list[dict[str, Any]]:
    """How often each word was used and was right, with the Wilson interval and whether it reaches the word's band."""
    names = np.array([word_for(min(max(float(q), 0.0), 1.0), scale).name for q in stage.confidence])
    rows = []
    for word in scale:
        used = names == word.name
        n, right = int(used.sum()), int(stage.correct[used].sum())
        low, high = wilson(right, n)
        rows.append(
            {"word": word, "n": n, "right": right / n if n else math.nan, "low": low, "high": high}
            | {"honest": bool(low <= word.high and high >= word.low)}
        )
    return rows


def _chosen(state: CalibrationState) -> dict[str, float]:
    return {
        "acc": metrics.accuracy(state),
        "mean_conf": metrics.mean_confidence(state),
        "ece15": metrics.ece(state),
        "ece_debiased": metrics.ece_debiased(state),
        "brier": metrics.brier(state),
        "auroc": ranking.auroc(state),
        "aurc": ranking.aurc(state),
    }

"""Tables and plots of graded answers for W&B; called on the tracker's own thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from calibtrain.calibration.metrics import reliability_table
from calibtrain.calibration.ranking import risk_coverage
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.answer import Answer

BINS = 15
CURVE_POINTS = 200
TABLE_ROWS = 200  # of the answers, spread evenly over their order


def evaluation_charts(split: str, answers: Sequence[Answer], texts: bool) -> dict[str, Any]:
    """Reliability diagram, confidence histograms of right and wrong answers, risk-coverage curve; a table of texts.

    Keys are `calib/<split>/answer/<chart>`. Without `texts` nothing holds a question or an answer. Model text enters the
    table as text, never as HTML or markdown. {} without graded answers.
    """
    import wandb

    graded = [answer for answer in answers if answer.correct is not None]
    if not graded:
        return {}
    confidence = np.array([answer.confidence for answer in graded])
    correct = np.array([bool(answer.correct) for answer in graded])
    state = state_of(torch.from_numpy(confidence), torch.from_numpy(correct))
    edges = np.linspace(0.0, 1.0, BINS + 1)
    charts = {
        **_reliability(state),
        **_risk_coverage(state),
        "confidence_right": wandb.Histogram(np_histogram=np.histogram(confidence[correct], edges)),
        "confidence_wrong": wandb.Histogram(np_histogram=np.histogram(confidence[~correct], edges)),
    }
    if texts:
        rows = [graded[i] for i in np.unique(np.linspace(0, len(graded) - 1, min(TABLE_ROWS, len(graded))).astype(int))]
        charts["answers"] = wandb.Table(
            columns=["question", "answer", "correct", "confidence"],
            data=[[answer.question, answer.text, bool(answer.correct), answer.confidence] for answer in rows],
        )
    return {f"calib/{split}/answer/{name}": chart for name, chart in charts.items()}


def _reliability(state: CalibrationState) -> dict[str, Any]:
    import wandb

    rows = reliability_table(state, BINS)
    columns = ("lo", "hi", "n", "confidence", "accuracy", "accuracy_low", "accuracy_high")
    table = wandb.Table(columns=list(columns), data=[[getattr(row, column) for column in columns] for row in rows])
    confidences = [row.confidence for row in rows]
    series = {
        "accuracy": [row.accuracy for row in rows],
        "95% low": [row.accuracy_low for row in rows],
        "95% high": [row.accuracy_high for row in rows],
        "calibrated": confidences,
    }
    plot = wandb.plot.line_series(
        confidences, list(series.values()), list(series), title=f"Reliability (n = {state.n})", xname="confidence"
    )
    return {"reliability": table, "reliability_diagram": plot}


def _risk_coverage(state: CalibrationState) -> dict[str, Any]:
    import wandb

    curve = risk_coverage(state)
    picked = np.unique(np.linspace(0, len(curve.coverage) - 1, CURVE_POINTS).astype(int))
    data = [[float(curve.coverage[i]), float(curve.risk[i]), float(curve.threshold[i])] for i in picked]
    table = wandb.Table(columns=["coverage", "risk", "threshold"], data=data)
    return {"risk_coverage": wandb.plot.line(table, "coverage", "risk", title=f"Risk and coverage (n = {state.n})")}

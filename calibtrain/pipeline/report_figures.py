"""Which figures the report shows, drawn from its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from calibtrain.calibration.intervals import wilson
from calibtrain.calibration.metrics import reliability_table
from calibtrain.calibration.ranking import risk_coverage
from calibtrain.pipeline.figures import Axes, Chart, Curve, curves, histogram, nice_ceiling, reliability
from calibtrain.pipeline.report_numbers import Stage

RELIABILITY_BINS, HISTOGRAM_BINS, CURVE_POINTS = 10, 20, 150
TRAINING_CURVES = (
    ("train/loss/nll", "Negative log-likelihood", "nats per token"),
    ("calib/train/token/ece15", "Token calibration error", "ECE"),
    ("calib/train/answer/ece15", "Answer calibration error", "ECE"),
    ("train/preference/accuracy", "Preference accuracy", "share"),
)


def all_figures(
    stages: Sequence[Stage], table: Mapping[str, Any] | None, target_risk: float, training: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`reliability` and `histograms` (one a stage), `tradeoff`, `risk`, `training`; None or [] where nothing is to show."""
    filled = [stage for stage in stages if stage.n]
    return {
        "reliability": [(s, reliability(reliability_table(s.state, RELIABILITY_BINS), _about(s))) for s in filled],
        "histograms": _histograms(filled),
        "tradeoff": _tradeoff(filled, table) if table else None,
        "risk": _risk(filled, table, target_risk) if table else None,
        "training": _training(training),
    }


def _histograms(stages: Sequence[Stage]) -> list[tuple[Stage, Markup]]:
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    counts = [[np.histogram(s.confidence[mask], edges)[0] for mask in (s.correct, ~s.correct)] for s in stages]
    top = int(nice_ceiling(max((int(c.max()) for pair in counts for c in pair), default=1)))
    return [
        (stage, histogram(right.tolist(), wrong.tolist(), top, f"Confidence of right and wrong answers, {stage.label}"))
        for stage, (right, wrong) in zip(stages, counts, strict=True)
    ]


def tradeoff_axes(stages: Sequence[Stage]) -> Axes:
    """Refusals from 0 to 1 against wrong answers from 0 to a little above the most there are."""
    return Axes(y_range=(0.0, min(1.0, nice_ceiling(max(1 - stage.accuracy for stage in stages)))))


def marker_axes(stages: Sequence[Stage]) -> dict[str, float]:
    """Where the page's script puts the slider's dot on the refusal figure."""
    axes = tradeoff_axes([stage for stage in stages if stage.n])
    top = axes.y_range[1]
    return {"x0": axes.x(0.0), "x1": axes.x(1.0), "y0": axes.y(0.0), "y1": axes.y(top), "top": top}


def _tradeoff(stages: Sequence[Stage], table: Mapping[str, Any]) -> Markup:
    lines = [_refusals(stages[0], raw=True)] if len(stages) > 1 else []
    chart = Chart("Refused against answered wrong", "refused", "answered and wrong", marker_id="tradeoff-marker")
    certified = None
    if table["certified"] is not None:
        row = table["rows"][table["certified"]]
        certified = (1 - row["answered"] / table["n"], row["wrong"] / table["n"])
    return curves([*lines, _refusals(stages[-1])], chart, tradeoff_axes(stages), certified=certified)


def _refusals(stage: Stage, raw: bool = False) -> Curve:
    curve = risk_coverage(stage.state)
    picked = _picked(len(curve.coverage))
    xs = [1.0, *(1 - curve.coverage[picked]).tolist()]
    return Curve(xs, [0.0, *(curve.num_wrong[picked] / stage.n).tolist()], raw)


def _risk(stages: Sequence[Stage], table: Mapping[str, Any], target_risk: float) -> Markup:
    lines = [_risk_curve(stages[0], raw=True)] if len(stages) > 1 else []
    lines.append(_risk_curve(stages[-1]))
    certified = None
    if table["certified"] is not None and table["rows"][table["certified"]]["answered"]:
        row = table["rows"][table["certified"]]
        certified = (row["answered"] / table["n"], row["wrong"] / row["answered"])
    chart = Chart("Share wrong among the answered, by share answered", "answered", "wrong among the answered")
    return curves(lines, chart, limit=target_risk, certified=certified)


def _risk_curve(stage: Stage, raw: bool = False) -> Curve:
    curve = risk_coverage(stage.state)
    picked = _picked(len(curve.coverage))
    bounds = [wilson(int(curve.num_wrong[i]), int(curve.num_answered[i])) for i in picked]
    low, high = ([], []) if raw else ([b[0] for b in bounds], [b[1] for b in bounds])
    return Curve(curve.coverage[picked].tolist(), curve.risk[picked].tolist(), raw, low, high)


def _training(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    drawn = []
    for key, title, unit in TRAINING_CURVES:
        points = [
            (line["step"], line[key]) for line in lines if line.get("event") == "log" and line.get(key) is not None
        ]
        if len(points) < 2:
            continue
        steps, values = [float(p[0]) for p in points], [float(p[1]) for p in points]
        axes = Axes((0.0, max(steps)), (0.0, nice_ceiling(max(values))), height=220)
        drawn.append((title, curves([Curve(steps, values)], Chart(title, "optimiser step", unit, percent=False), axes)))
    return drawn


def _picked(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(CURVE_POINTS, length)).astype(int))


def _about(stage: Stage) -> str:
    return f"Reliability of {stage.label}: accuracy against stated confidence, {stage.n} answers"

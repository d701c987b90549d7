"""The part of a quantised model's report that says what its bits cost: words, table, figures and changed answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError
from calibtrain.pipeline import page
from calibtrain.pipeline import quantize_words as words
from calibtrain.pipeline.figures import TOP, Axes, framed, nice_ceiling

FORMAT = 1
KEYS = ("source", "source_hash", "model_hash", "template_hash", "label", "method", "table", "cost", "quantization")
SHOWN = {"right_to_wrong": 8, "wrong_to_right": 4}  # changed answers on the page
BINS = 10
KINDS = {
    "same": "the same answer",
    "right_to_wrong": "right before, wrong now",
    "wrong_to_right": "wrong before, right now",
    "other": "another answer, graded as before",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What the page is made of: quantization.json, and both models' answers to the test questions in the same order."""

    content: Mapping[str, Any]
    before: Sequence[Answer]
    after: Sequence[Answer]
    confidence: tuple[NDArray[np.float64], NDArray[np.float64]]  # both by the full-precision model's calibrator


def read_quantization(path: Path) -> dict[str, Any]:
    """Content of a quantization.json. Raises UserError naming the file where it cannot be read whole."""
    again = "run `calibtrain quantize` again"
    content = page.read_content(path, FORMAT, again)
    missing = next((key for key in KEYS if key not in content), None)
    if missing is not None:
        raise UserError(f"{path}: {missing} is missing; {again}")
    return content


def report_part(part: Part, *, samples: bool = True) -> dict[str, Any]:
    """What the template shows. `samples`: questions with both answers, too."""
    content = part.content
    kinds = kinds_of(part.before, part.after)
    kept = content["table"]["kept_threshold"]
    return {
        "label": content["label"],
        "method": content["method"],
        "source": content["source"],
        "told": words.told(content),
        "rows": words.table_rows(content),
        "changed": words.changed_rows(content),
        "costs": words.cost_rows(content),
        "loading": words.LOADING,
        "kinds": KINDS,
        "scatter": scatter(*part.confidence, kinds, None if kept is None else kept["threshold"]),
        "turned": turned(part.confidence[0], kinds),
        "shift": shift(*part.confidence),
        "questions": content["table"]["questions"],
        "samples": _samples(part, kinds) if samples else [],
        "facts": _facts(content),
    }


def kinds_of(before: Sequence[Answer], after: Sequence[Answer]) -> NDArray[Any]:
    """Which of KINDS each question is (n,)."""
    found = []
    for one, other in zip(before, after, strict=True):
        if bool(one.correct) != bool(other.correct):
            found.append("right_to_wrong" if one.correct else "wrong_to_right")
        else:
            found.append("same" if one.meaning == other.meaning else "other")
    return np.array(found, dtype=object)


def scatter(
    before: NDArray[np.float64], after: NDArray[np.float64], kinds: NDArray[Any], threshold: float | None
) -> Markup:
    """Confidence of each question before and after; each kind has a shape of its own."""
    axes = Axes()
    parts = [f'<path class="ideal" d="{axes.path([0, 1], [0, 1])}"/>']
    if threshold is not None and threshold <= 1:
        x, y = axes.x(threshold), axes.y(threshold)
        parts.append(f'<path class="limit" d="M{x},{axes.y(0)}V{axes.y(1)}M{axes.x(0)},{y}H{axes.x(1)}"/>')
        parts.append(f'<text class="note" x="{axes.x(0) + 5}" y="{y - 5}">old threshold</text>')
    shapes = {
        "same": "M{x},{y}h0",
        "other": "M{x},{y}m-2.4,0a2.4,2.4 0 1,0 4.8,0a2.4,2.4 0 1,0 -4.8,0",
        "wrong_to_right": "M{x},{y}m-3.4,0h6.8m-3.4,-3.4v6.8",
        "right_to_wrong": "M{x},{y}m-3.4,-3.4l6.8,6.8m0,-6.8l-6.8,6.8",
    }
    for kind, shape in shapes.items():
        mine = kinds == kind
        drawn = "".join(
            shape.format(x=axes.x(float(a)), y=axes.y(float(b))) for a, b in zip(before[mine], after[mine], strict=True)
        )
        if drawn:
            parts.append(f'<path class="q-{kind}" d="{drawn}"/>')
    title = f"Confidence of {len(before)} answers before and after quantising"
    return framed(axes, parts, title, "confidence in full precision", "confidence, quantised")


def turned(before: NDArray[np.float64], kinds: NDArray[Any]) -> Markup:
    """Share of the answers that changed, by the confidence before, in tenths: stacked by kind."""
    place = np.minimum((before * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    stacked = ("right_to_wrong", "wrong_to_right", "other")
    shares = {kind: np.bincount(place[kinds == kind], minlength=BINS) / np.maximum(counts, 1) for kind in stacked}
    top = min(1.0, nice_ceiling(float(sum(shares.values()).max())))  # type: ignore[union-attr]
    axes, parts = Axes(y_range=(0.0, top)), []
    for one in range(BINS):
        x, width, level = axes.x(one / BINS) + 1.5, axes.x(1 / BINS) - axes.x(0) - 3, 0.0
        told = "; ".join(f"{KINDS[kind]}: {shares[kind][one]:.0%}" for kind in stacked)
        hint = f"<title>{one / BINS:.0%} to {(one + 1) / BINS:.0%}, n = {counts[one]}: {told}</title>"
        for kind in stacked:
            share = float(shares[kind][one])
            if share:
                y, height = axes.y(level + share), axes.y(level) - axes.y(level + share)
                parts.append(
                    f'<rect class="b-{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">{hint}</rect>'
                )
            level += share
    return framed(axes, parts, "Changed answers by confidence before", "confidence in full precision", "changed")


def shift(before: NDArray[np.float64], after: NDArray[np.float64]) -> Markup:
    """How far the log-odds of a question's answer moved, by the confidence before: median and middle half of each tenth."""
    moved = _logit(after) - _logit(before)
    place = np.minimum((before * BINS).astype(int), BINS - 1)
    bins = [(one, moved[place == one]) for one in range(BINS) if (place == one).sum() >= 3]
    ends = [abs(float(end)) for _, values in bins for end in np.quantile(values, [0.25, 0.75])]
    top = nice_ceiling(max(ends, default=1.0))
    axes = Axes(y_range=(-top, top))
    parts = [f'<path class="axis" d="{axes.path([0, 1], [0, 0])}"/>']
    for one, values in bins:
        low, middle, high = (float(end) for end in np.quantile(values, [0.25, 0.5, 0.75]))
        x = axes.x((one + 0.5) / BINS)
        hint = f"<title>{one / BINS:.0%} to {(one + 1) / BINS:.0%}, n = {len(values)}: median {middle:+.2f}</title>"
        parts.append(
            f'<g>{hint}<path class="whisker q-half" d="M{x},{axes.y(low)}V{axes.y(high)}"/>'
            f'<circle class="dot" cx="{x}" cy="{axes.y(middle)}" r="4"/></g>'
        )
    ticks = [
        (value, f"{value:+.3g}".replace("-", "−") if value else "0") for value in np.linspace(-top, top, 5).tolist()
    ]
    parts.append(f'<text class="note" x="{axes.x(0) + 5}" y="{TOP + 10}">▲ surer than before</text>')
    parts.append(f'<text class="note" x="{axes.x(0) + 5}" y="{axes.y(-top) - 6}">▼ less sure</text>')
    return framed(
        axes, parts, "Shift of the log-odds", "confidence in full precision", "change of the log-odds", y_ticks=ticks
    )


def _logit(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    q = np.clip(confidence, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(q) - np.log1p(-q))


def _samples(part: Part, kinds: NDArray[Any]) -> list[dict[str, Any]]:
    """Answers that turned, the surest before first."""
    found = []
    for kind, most in SHOWN.items():
        places = sorted(np.flatnonzero(kinds == kind).tolist(), key=lambda place: -part.confidence[0][place])[:most]
        found += [
            {"kind": kind, "before": part.before[place], "after": part.after[place]}
            | {"confidence": tuple(float(one[place]) for one in part.confidence)}
            for place in places
        ]
    return found


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was made, as far as a person asks; quantization.json has the rest."""
    made: Mapping[str, Any] = content["quantization"] if isinstance(content["quantization"], Mapping) else {}
    by, settings = content.get("calibration_set"), content.get("settings", {})
    found = [("Scheme", content["label"]), ("Method", content["method"]), ("Made of", content["source"])]
    if content["method"] == "smoothquant":
        found.append(("Alpha", f"{settings.get('alpha')}"))
    if settings.get("rotate"):
        found.append(("Rotated", "the residual stream and the values of every head; the head is a matrix of its own"))
    if by:
        found.append(("Quantised by", f"{by['n']} calibration questions with the model's own answers. {by['verdict']}"))
    if kept := made.get("full_precision"):
        found.append(("In full precision", _listed(kept)))
    if made.get("no_folds"):
        found.append(("Folds", f"none: {made['no_folds']}"))
    if massive := made.get("massive_first_tokens"):
        found.append(("First token far larger than others", f"in what {len(massive)} layers read: {_listed(massive)}"))
    if isinstance(made.get("seconds"), int | float):
        memory = f", {made['peak_gb']:.1f} GB of memory" if isinstance(made.get("peak_gb"), int | float) else ""
        found.append(("Took", f"{made['seconds']:.0f} seconds{memory}"))
    return found


def _listed(names: Any, most: int = 6) -> str:
    every = [str(one) for one in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")

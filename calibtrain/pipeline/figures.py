"""The report's figures as inline SVG: geometry only, no text of the model, no library to load.

Colours and fonts come from the page's CSS variables, so one figure serves light, dark and print. Every distinction has a
shape beside its colour: wrong answers are hatched, raw models dashed, certified points diamonds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from calibtrain.calibration.metrics import ReliabilityRow

WIDTH, HEIGHT = 360, 290
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 42


@dataclass(frozen=True, slots=True)
class Axes:
    """Linear scales from data to the SVG's units."""

    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    height: int = HEIGHT

    def x(self, value: float) -> float:
        """Horizontal position."""
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Vertical position."""
        low, high = self.y_range
        return round(self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM), 2)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """`d` of a polyline."""
        return "M" + "L".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))


def reliability(rows: Sequence[ReliabilityRow], title: str) -> Markup:
    """Accuracy against stated confidence, with Wilson intervals; a dot's area grows with its n."""
    axes = Axes()
    largest = max((row.n for row in rows), default=1)
    parts = [f'<path class="ideal" d="{axes.path([0, 1], [0, 1])}"/>']
    for row in rows:
        x, y = axes.x(row.confidence), axes.y(row.accuracy)
        corner = f"M{x},{y}L{axes.x(row.confidence)},{axes.y(row.confidence)}"
        hint = (
            f"stated {row.confidence:.0%}, right {row.accuracy:.0%} ({row.accuracy_low:.0%} to {row.accuracy_high:.0%})"
        )
        parts.append(
            f'<g><title>{hint}, n = {row.n}</title><path class="gap" d="{corner}"/>'
            f'<path class="whisker" d="M{x},{axes.y(row.accuracy_low)}V{axes.y(row.accuracy_high)}"/>'
            f'<circle class="dot" cx="{x}" cy="{y}" r="{2.5 + 5.5 * math.sqrt(row.n / largest):.1f}"/></g>'
        )
    return framed(axes, parts, title, "stated confidence", "share right")


def histogram(right: Sequence[int], wrong: Sequence[int], top: int, title: str) -> Markup:
    """Answers by confidence in equal bins: right ones upwards, wrong ones downwards and hatched; `top` sets the scale."""
    axes = Axes(y_range=(-float(top), float(top)))
    parts = []
    bins = len(right)
    for i, (up, down) in enumerate(zip(right, wrong, strict=True)):
        x, width = axes.x(i / bins) + 1, axes.x(1 / bins) - axes.x(0) - 2
        hint = f"<title>{i / bins:.0%} to {(i + 1) / bins:.0%}: {up} right, {down} wrong</title>"
        bars = [(up, axes.y(up), "bar-right"), (down, axes.y(0), "bar-wrong")]
        for count, y, name in bars:
            if count:
                height = abs(axes.y(0) - axes.y(count))
                parts.append(
                    f'<rect class="{name}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">{hint}</rect>'
                )
    parts.append(f'<path class="axis" d="{axes.path([0, 1], [0, 0])}"/>')
    parts.append(f'<text class="note" x="{axes.x(0) + 6}" y="{TOP + 10}">▲ right</text>')
    parts.append(f'<text class="note" x="{axes.x(1)}" y="{HEIGHT - BOTTOM - 6}" text-anchor="end">▼ wrong</text>')
    ticks = [(float(v), str(abs(v))) for v in (-top, -top // 2, 0, top // 2, top)]
    return framed(axes, parts, title, "stated confidence", "answers", y_ticks=ticks)


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart with an optional band; `raw` lines are dashed."""

    xs: Sequence[float]
    ys: Sequence[float]
    raw: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Words of a curve chart."""

    title: str
    x_label: str
    y_label: str
    percent: bool = True
    marker_id: str = ""  # of a dot that the page's slider moves


def curves(
    lines: Sequence[Curve],
    chart: Chart,
    axes: Axes | None = None,
    limit: float | None = None,
    certified: tuple[float, float] | None = None,
) -> Markup:
    """Lines with bands, a horizontal limit and the certified point."""
    axes = axes or Axes()
    parts = []
    for line in lines:
        if line.low and len(line.xs) > 1:
            back = axes.path(list(reversed(line.xs)), list(reversed(line.low)))[1:]
            parts.append(f'<path class="band" d="{axes.path(line.xs, line.high)}L{back}Z"/>')
    if limit is not None:
        parts.append(f'<path class="limit" d="{axes.path(axes.x_range, [limit, limit])}"/>')
        parts.append(
            f'<text class="note" x="{axes.x(axes.x_range[1])}" y="{axes.y(limit) - 5}" text-anchor="end">'
            f"target {limit:.0%}</text>"
        )
    for line in lines:
        if line.xs:
            name = "line raw" if line.raw else "line"
            parts.append(f'<path class="{name}" d="{axes.path(line.xs, line.ys)}"/>')
    if certified is not None:
        x, y = axes.x(certified[0]), axes.y(certified[1])
        diamond = f"M{x},{y - 10}L{x + 10},{y}L{x},{y + 10}L{x - 10},{y}Z"
        parts.append(f'<path class="certified" d="{diamond}"><title>certified</title></path>')
    if chart.marker_id:
        parts.append(f'<circle class="marker" id="{chart.marker_id}" r="4.5" cx="-20" cy="-20"/>')
    y_ticks = None if chart.percent else _ticks(*axes.y_range)
    x_ticks = _ticks(*axes.x_range) if axes.x_range != (0.0, 1.0) else None
    return framed(axes, parts, chart.title, chart.x_label, chart.y_label, x_ticks=x_ticks, y_ticks=y_ticks)


def nice_ceiling(value: float) -> float:
    """Least of 1, 2, 2.5, 4, 5, 6, 8 x 10^k that is at least `value`; 1 for 0 or less."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    return [(value, f"{value:.3g}") for value in (low + (high - low) * i / 4 for i in range(5))]


def _percent_ticks(low: float, high: float) -> list[tuple[float, str]]:
    values = [low + (high - low) * i / 4 for i in range(5)]
    return [(value, f"{100 * value:.3g}%") for value in values]


def framed(
    axes: Axes,
    parts: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_ticks: Sequence[tuple[float, str]] | None = None,
) -> Markup:
    """Frame, grid, ticks and labels around the parts."""
    low = axes.height - BOTTOM
    frame = []
    for value, text in y_ticks if y_ticks is not None else _percent_ticks(*axes.y_range):
        y = axes.y(value)
        frame.append(f'<path class="grid" d="M{LEFT},{y}H{WIDTH - RIGHT}"/>')
        frame.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{escape(text)}</text>')
    for value, text in x_ticks if x_ticks is not None else _percent_ticks(*axes.x_range):
        frame.append(
            f'<text class="tick" x="{axes.x(value)}" y="{low + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    frame.append(
        f'<text class="label" x="{middle}" y="{axes.height - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    frame.append(
        f'<text class="label" transform="translate(11,{(TOP + low) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {axes.height}" role="img" aria-label="{escape(title)}">{"".join([*frame, *parts])}</svg>'
    )

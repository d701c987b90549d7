"""Figures of the spectra as inline SVG: maps by layer and module, a spectrum before and after, parts of a change.

Maps and bars place everything in percent of their width, so they fill a wide screen, a phone and paper alike and their
text is never stretched. Colours are steps of opacity over the page's own (classes q0 to q7, and n0 to n3, p0 to p3 on two
sides of a middle), so one figure serves light, dark and print; what is beyond chance carries a dot, not a colour alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from calibtrain.pipeline import page
from calibtrain.pipeline import spectra_numbers as numbers
from calibtrain.pipeline import spectra_words as words
from calibtrain.pipeline.figures import Axes, framed, nice_ceiling
from calibtrain.pipeline.spectra_numbers import Grid, Row

CELL, TICKS = 22, 20  # heights of a map's row and of its layer numbers
NAME = 18  # characters of a module's name that fit beside its row
STEPS = 8
FIGURE = 250  # height of the figures of one matrix
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PLACE = "place, from the largest to the smallest"
DECADES = 6  # that the figure of a spectrum shows at most


def short(found: float) -> str:
    """Three digits at every size, with powers of ten as people write them."""
    digits, _, power = f"{found:.3g}".partition("e")
    return (digits + (f"×10{str(int(power)).translate(RAISED)}" if power else "")).replace("-", "−")


def percent(found: float) -> str:
    """With three digits at every size: relative drifts lie between 0.01% and 10%."""
    return f"{short(100 * found)}%"


def signed(found: float) -> str:
    """A percentage that says its sign."""
    return ("+" if found > 0 else "") + percent(found)


def degrees(found: float) -> str:
    """An angle."""
    return f"{short(found)}°"


def times(found: float) -> str:
    """A ratio."""
    return f"{found:.2g}×"


@dataclass(frozen=True, slots=True)
class Map:
    """One number of every matrix, and how it is drawn and told."""

    key: str
    title: str
    says: str  # what the number is, in a sentence
    value: Callable[[Row], float | None]
    text: Callable[[float], str]
    test: str | None = None  # whose matrices beyond chance get a dot
    middle: float | None = None  # of a scale with two sides; 1 for ratios, whose steps are factors


MAPS = (
    Map(
        "drift",
        "How far it moved",
        "Relative drift: the size of the change over the size of the matrix, |W − W0| / |W0|.",
        lambda row: numbers.value(row, "relative_drift"),
        percent,
    ),
    Map(
        "level",
        "Level of the scaling",
        "By how much one factor makes all singular values larger or smaller, α − 1.",
        numbers.level,
        signed,
        "scale",
        0.0,
    ),
    Map(
        "spread",
        "Spread of the scaling",
        "How unevenly the singular values changed: the middle half of log(s / s0) spans this much. "
        "A scaling is uniform where this is small beside the level.",
        lambda row: numbers.value(row, "scale", "spread"),
        percent,
        "uniform_scaling",
    ),
    Map(
        "angle",
        "Angle of the rotation",
        "By how many degrees the rotation that left and right singular vectors share turns them "
        "(root mean square, large singular values count more).",
        lambda row: numbers.value(row, "angles", "shared"),
        degrees,
        "shared_rotation",
    ),
    Map(
        "consistency",
        "Do both sides turn together?",
        "How differently left and right singular vectors turn (NF), over what random noise of the same size does. "
        "1× is chance; below it they turn together more than that.",
        numbers.against_null,
        times,
        "shared_rotation",
        1.0,
    ),
)


@dataclass(frozen=True, slots=True)
class Steps:
    """Colours of a map: `edges` between them, ascending; what lies beyond the outer ones takes the outer colours."""

    edges: Sequence[float]  # STEPS + 1
    names: Sequence[str]  # STEPS classes

    def name(self, found: float) -> str:
        """The colour's class."""
        return self.names[min(max(bisect_right(self.edges, found) - 1, 0), STEPS - 1)]


def steps_of(values: Sequence[float], middle: float | None) -> Steps:
    """Even steps that hold 95% of the values, from 0 or to both sides of the middle; by factors around 1."""
    if middle is None:
        top = _top(values)
        return Steps([top * i / STEPS for i in range(STEPS + 1)], [f"q{i}" for i in range(STEPS)])
    half = STEPS // 2
    names = [*(f"n{i}" for i in reversed(range(half))), *(f"p{i}" for i in range(half))]
    if middle == 1.0:  # below is what the page looks for, so it takes the page's first colour
        names = names[::-1]
        top = _top([abs(math.log2(one)) if one > 0 else 0.0 for one in values])
        return Steps([2.0 ** (top * i / half) for i in range(-half, half + 1)], names)
    top = _top([abs(one - middle) for one in values])
    return Steps([middle + top * i / half for i in range(-half, half + 1)], names)


def _most(values: Sequence[float]) -> float:
    """What 95% of the values do not exceed, so that one odd matrix does not pale all others."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else 0.0


def _top(values: Sequence[float]) -> float:
    """Where the colours end: 95% of the values are below, and its quarters are short numbers."""
    most = _most(values)
    power = 10.0 ** math.floor(math.log10(most)) if most > 0 else 0.01
    return power * next(step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= most * (1 - 1e-9))


def heat_map(grid: Grid, what: Map) -> Markup:
    """Layers from left to right, modules from top to bottom, with a legend. Every cell names its numbers."""
    drawn = {place: numbers.middle([what.value(row) for row in rows]) for place, rows in grid.cells.items()}
    known = [one for one in drawn.values() if one is not None]
    steps = steps_of(known, what.middle)
    width, parts, dots = 100.0 / max(len(grid.layers), 1), [], 0
    radius = 3 if len(grid.layers) <= 40 else 2.2
    for column, layer in enumerate(grid.layers):
        x = column * width
        for line, module in enumerate(grid.modules):
            y, centre = line * CELL + CELL // 2, f"{x + width / 2:.3f}%"
            rows = grid.cells.get((layer, module))
            if not rows:
                left, right = (f"{x + width * at:.3f}%" for at in (0.35, 0.65))
                parts.append(f'<line class="absent" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
                continue
            middle = drawn[layer, module]
            name = "unknown" if middle is None else steps.name(middle)
            hint = escape(_hint(layer, module, rows, what, middle))
            parts.append(
                f'<rect class="{name}" x="{x:.3f}%" y="{line * CELL}" width="{width:.3f}%" height="{CELL}">'
                f"<title>{hint}</title></rect>"
            )
            if what.test and 2 * sum(numbers.beyond(row, what.test) for row in rows) > len(rows):
                parts.append(f'<circle class="beyond" cx="{centre}" cy="{y}" r="{radius}"/>')
                dots += 1
    height = CELL * len(grid.modules) + TICKS
    about = f"{what.title} by layer and module"
    if known:
        about += f", {what.text(min(known))} to {what.text(max(known))}"
    cell, n = max(7, min(22, 240 // max(len(grid.layers), 1))), len(grid.layers)
    size = f"height:{height}px;min-width:{cell * n}px;max-width:{80 * n}px"
    return Markup(
        f'<div class="map">{_names(grid, height)}<div class="sideways" tabindex="0"><svg class="cells" role="img" '
        f'aria-label="{escape(about)}" style="{size}">{"".join(parts)}{_layer_numbers(grid, width)}</svg></div></div>'
        f"{_legend(steps, what)}{_key(what, grid, dots, len(known) < len(drawn))}"
    )


def _hint(layer: int | None, module: str, rows: Sequence[Row], what: Map, middle: float | None) -> str:
    place = module if layer is None else f"layer {layer} {module}"
    text = "no value" if middle is None else what.text(middle)
    beyond = sum(numbers.beyond(row, what.test) for row in rows) if what.test else 0
    if len(rows) > 1:
        known = [one for row in rows if (one := what.value(row)) is not None]
        span = f" ({what.text(min(known))} to {what.text(max(known))})" if known else ""
        tail = f"; beyond chance in {beyond}" if what.test else ""
        return f"{place}, {len(rows)} matrices: median {text}{span}{tail}"
    (row,) = rows
    if middle is None:
        return f"{place}: no value"
    if what.key == "level" and (spread := numbers.value(row, "scale", "spread")) is not None:
        text += f", spread {percent(spread)}"
    if what.key == "angle":
        sides = {side: numbers.value(row, "angles", side) for side in ("left", "right")}
        text += "".join(f", {side} {degrees(one)}" for side, one in sides.items() if one is not None)
    if what.key == "consistency" and (nf := numbers.value(row, "consistency", "nf")) is not None:
        null = numbers.value(row, "consistency", "null")
        text += f", NF {nf:.3g}" + ("" if null is None else f" against {null:.3g} by chance")
    return f"{place}: {text}" + ("; beyond chance" if beyond else "")


def _names(grid: Grid, height: int) -> str:
    """The modules beside the map, which stay where they are when it scrolls."""
    parts = []
    for line, module in enumerate(grid.modules):
        short = module if len(module) <= NAME else module[: NAME - 1] + "…"
        parts.append(
            f'<text class="tick" x="100%" y="{line * CELL + CELL // 2 + 4}" text-anchor="end">'
            f"<title>{escape(module)}</title>{escape(short)}</text>"
        )
    parts.append(f'<text class="tick" x="100%" y="{height - 5}" text-anchor="end">layer</text>')
    width = 12 + 6 * max(min(len(module), NAME) for module in (*grid.modules, "layer"))
    return f'<svg class="names" aria-hidden="true" style="height:{height}px;width:{width}px">{"".join(parts)}</svg>'


def _layer_numbers(grid: Grid, width: float) -> str:
    """Every layer's number where they fit, else every second, fifth, tenth, ..."""
    every = next((one for one in (1, 2, 5, 10, 20, 50) if len(grid.layers) <= 14 * one), 100)
    y = CELL * len(grid.modules) + TICKS - 5
    return "".join(
        f'<text class="tick" x="{(column + 0.5) * width:.3f}%" y="{y}" text-anchor="middle">'
        f"{'–' if layer is None else layer}</text>"
        for column, layer in enumerate(grid.layers)
        if layer is None or column % every == 0
    )


def _legend(steps: Steps, what: Map) -> str:
    width, parts = 100.0 / STEPS, []
    for i, name in enumerate(steps.names):
        parts.append(f'<rect class="{name}" x="{i * width}%" y="0" width="{width}%" height="12"/>')
    for i in range(0, STEPS + 1, 2 if what.middle is None else STEPS // 2):
        anchor = "start" if i == 0 else "end" if i == STEPS else "middle"
        parts.append(
            f'<text class="tick" x="{i * width}%" y="26" text-anchor="{anchor}">{what.text(steps.edges[i])}</text>'
        )
    label = f"Colours, from {what.text(steps.edges[0])} to {what.text(steps.edges[-1])}"
    return f'<svg class="scale" role="img" aria-label="{escape(label)}" style="height:30px">{"".join(parts)}</svg>'


def _key(what: Map, grid: Grid, dots: int, unknown: bool) -> str:
    """What is in the map beside colours."""
    beyond = f"{words.DOTS.get(what.test or '')}: {dots or 'none'}"
    kinds = [
        (what.test is not None, '<circle class="beyond" cx="7" cy="7" r="4"/>', beyond),
        (unknown, '<rect class="unknown" x="1" y="1" width="12" height="12"/>', "no value"),
        (grid.sparse, '<line class="absent" x1="3" x2="11" y1="7" y2="7"/>', "no such matrix"),
    ]
    items = [
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{shape}</svg>{text}</li>'
        for present, shape, text in kinds
        if present
    ]
    if grid.most > 1:
        items.append(f"<li>a cell is the median of up to {grid.most} matrices</li>")
    return f'<ul class="key soft">{"".join(items)}</ul>' if items else ""


def spectrum_range(row: Row) -> tuple[float, float]:
    """Logarithms (base 10) between which the singular values of a row are drawn: DECADES below the largest at most."""
    values = numbers.spectrum_of(row)["before"] or [1.0]
    top = math.log10(max(values)) + 0.05
    return max(math.log10(min(values)) - 0.05, top - DECADES), top


def spectrum_ticks(low: float, high: float) -> list[str]:
    """Singular values at even steps of that range."""
    return [f"{10 ** (low + (high - low) * i / 4):.2g}" for i in range(5)]


def change_limit(row: Row) -> float:
    """Half the height of the figure of the change: 95% of the singular values are within it."""
    return nice_ceiling(1.1 * _most([abs(one) for one in numbers.spectrum_of(row)["change"]]))


def spectrum(row: Row) -> Markup:
    """Singular values before and after on a log scale; the page's script redraws `before`, `after` and the scale."""
    drawn, (low, high) = numbers.spectrum_of(row), spectrum_range(row)
    after = [b * (1 + change) for b, change in zip(drawn["before"], drawn["change"], strict=True)]
    axes, parts = Axes(y_range=(low, high), height=FIGURE), []
    for name, style, values in (("before", "line raw", drawn["before"]), ("after", "line thin", after)):
        logs = [min(max(math.log10(one), low), high) if one > 0 else low for one in values]
        parts.append(f'<path id="{name}" class="{style}" d="{axes.path(drawn["at"], logs) if logs else ""}"/>')
    ticks = [(low + (high - low) * i / 4, text) for i, text in enumerate(spectrum_ticks(low, high))]
    return framed(axes, parts, "Singular values before and after", PLACE, "singular value", y_ticks=ticks)


def change_ticks(limit: float) -> list[str]:
    """Numbers beside that figure."""
    return [signed(limit * i / 2) for i in (-2, -1, 0, 1, 2)]


def change(row: Row) -> Markup:
    """By how much each singular value changed, in percent; the page's script redraws `change` and the scale's numbers."""
    limit, drawn = change_limit(row), numbers.spectrum_of(row)
    axes = Axes(y_range=(-limit, limit), height=FIGURE)
    values = [min(max(one, -limit), limit) for one in drawn["change"]]
    parts = [
        f'<path class="ideal" d="{axes.path([0, 1], [0, 0])}"/>',
        f'<path id="change" class="line thin" d="{axes.path(drawn["at"], values) if values else ""}"/>',
    ]
    ticks = [(limit * (i - 2) / 2, text) for i, text in enumerate(change_ticks(limit))]
    return framed(axes, parts, "Change of each singular value", PLACE, "change", y_ticks=ticks)


def part(found: float | None) -> str:
    """A share to a tenth of a percent."""
    return "under 0.1%" if found is not None and 0 < found < 5e-4 else page.share(found)


def shares(found: dict[str, float | None], titles: dict[str, str]) -> Markup:
    """One bar of a module's parts."""
    parts, start = [], 0.0
    for name in numbers.PARTS:
        one = found[name]
        if one is None:
            return Markup('<span class="soft">nothing changed</span>')
        width = 100 * min(max(one, 0.0), 1.0 - start / 100)
        hint = f"<title>{escape(titles[name])}: {part(one)}</title>"
        parts.append(f'<rect class="part-{name}" x="{start:.2f}%" y="0" width="{width:.2f}%" height="20">{hint}</rect>')
        start += width
    return Markup(f'<svg class="bar" aria-hidden="true" style="height:20px">{"".join(parts)}</svg>')

"""spectra.html: what training did to the weights, from spectra.json, in words, maps and tables; and its part of the report.

The page is made as report.html is: inline SVG, nothing loaded, everything but the choice of a matrix works without script.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibtrain.errors import UserError
from calibtrain.pipeline import page
from calibtrain.pipeline import spectra_figures as figures
from calibtrain.pipeline import spectra_numbers as numbers
from calibtrain.pipeline import spectra_words as words
from calibtrain.pipeline.spectra_numbers import Row

FORMAT = 1
KEYS = {
    "base": str,
    "tuned": str,
    "tuned_hash": str,
    "settings": dict,
    "matrices": list,
    "left_out": list,
    "summary": dict,
    "findings": list,
}
ENTRIES = {
    "matrices": ("name", "layer", "module", "shape", "dtype", "kind"),
    "findings": ("claim", "beyond", "text"),
    "left_out": ("name", "why"),
}
FACTS = (
    "looks like",
    "size",
    "relative drift",
    "directions that hold 99% of it",
    "level of the scaling",
    "its spread, its slope",
    "change of the largest singular value",
    "stable rank",
    "turned: left, right, together",
    "NF, by chance",
    "polar_drift",
    "row_gram_drift, column_gram_drift",
    "row_stretch, column_stretch",
)


def read_spectra(path: Path) -> dict[str, Any]:
    """Content of a spectra.json. Raises UserError naming the file where it cannot be read whole."""
    again = "run `calibtrain spectra` again"
    content = page.read_content(path, FORMAT, again)
    fault = _fault(content)
    if fault:
        raise UserError(f"{path}: {fault}; {again}")
    return content


def _fault(content: Mapping[str, Any]) -> str | None:
    """What the page needs and the file lacks. Numbers may be missing, places to put them in may not."""
    for key, kind in KEYS.items():
        if key not in content:
            return f"{key} is missing"
        if not isinstance(content[key], kind):
            return f"{key} is not a {kind.__name__}"
    for part, keys in ENTRIES.items():
        for i, one in enumerate(content[part]):
            for key in keys:
                if not isinstance(one, dict) or key not in one:
                    return f"{part}[{i}].{key} is missing"
    return None


def write_page(output: Path, spectra: Mapping[str, Any]) -> Path:
    """Write the page to `output`, a file or a directory that gets spectra.html. Returns the file's path."""
    path = output / "spectra.html" if output.is_dir() or not output.suffix else output
    return page.write(path, render_page(spectra))


def render_page(spectra: Mapping[str, Any]) -> str:
    """The page as text. Names of models and tensors are escaped: they are other people's text."""
    rows = spectra["matrices"]
    grid, listed = numbers.grid_of(rows), numbers.shown(rows)
    chosen = numbers.furthest(listed) if listed else 0
    return page.render(
        "spectra.html.j2",
        {
            "spectra": spectra,
            "rows": rows,
            "grid": grid,
            "maps": [(one, figures.heat_map(grid, one)) for one in figures.MAPS],
            "told": words.told(spectra["findings"]),
            "listed": listed,
            "chosen": chosen,
            "spectrum": figures.spectrum(listed[chosen]) if listed else "",
            "change": figures.change(listed[chosen]) if listed else "",
            "facts": list(zip(FACTS, facts(listed[chosen]), strict=True)) if listed else [],
            "data": _data(listed),
            "modules": [
                one | {"bar": figures.shares(one["shares"], words.PARTS)} for one in numbers.module_shares(grid)
            ],
            "tests": numbers.test_table(rows, spectra["summary"]),
            "table": [_line(row) for row in listed],
            "reasons": numbers.left_out_reasons(spectra["left_out"]),
            **_again(spectra),
            "words": words,
            "nulls": numbers.NULLS,
        },
        small=figures.percent,
        signed=figures.signed,
        part=figures.part,
    )


def report_part(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's report shows of it: the findings and the map of relative drift."""
    drift = figures.MAPS[0]
    return {
        "findings": spectra["findings"],
        "map": drift,
        "figure": figures.heat_map(numbers.grid_of(spectra["matrices"]), drift),
    }


def facts(row: Row) -> list[str]:
    """The numbers of one matrix in words, one for each of FACTS."""

    def told(text: Any, *keys: str) -> str:
        found = numbers.value(row, *keys)
        return "–" if found is None else text(found)

    rank = numbers.value(row, "rank")
    cut = f", its {rank:.0f} largest singular values" if rank is not None and rank < min(row["shape"]) else ""
    level, stable = numbers.level(row), row.get("stable_rank") or (None, None)
    return [
        str(row["kind"]),
        f"{' × '.join(map(str, row['shape']))}, {row['dtype']}" + cut,
        told(figures.percent, "relative_drift"),
        told(lambda found: f"{found:.0f} of {min(row['shape'])}", "update_rank"),
        "–" if level is None else figures.signed(level),
        f"{told(figures.percent, 'scale', 'spread')}, {told(figures.short, 'scale', 'slope')}",
        told(lambda found: figures.signed(found - 1.0), "spectral_norm_ratio"),
        " → ".join(page.number(one, 1) for one in stable),
        ", ".join(told(figures.degrees, "angles", side) for side in ("left", "right", "shared")),
        f"{told(figures.short, 'consistency', 'nf')}, {told(figures.short, 'consistency', 'null')}",
        told(figures.short, "drift", "polar_drift"),
        f"{told(figures.short, 'drift', 'row_gram_drift')}, {told(figures.short, 'drift', 'column_gram_drift')}",
        f"{told(figures.short, 'drift', 'row_stretch')}, {told(figures.short, 'drift', 'column_stretch')}",
    ]


def _line(row: Row) -> dict[str, Any]:
    """A row of the table of all matrices."""
    found = {test: numbers.value(row, "tests", test, "q") for test in numbers.TESTS}
    return {
        "row": row,
        "drift": numbers.value(row, "relative_drift"),
        "level": numbers.level(row),
        "spread": numbers.value(row, "scale", "spread"),
        "angle": numbers.value(row, "angles", "shared"),
        "ratio": numbers.against_null(row),
        "tests": [(test, q, numbers.beyond(row, test)) for test, q in found.items()],
    }


def _data(listed: Sequence[Row]) -> dict[str, Any]:
    """What the page's script redraws from: the corners of the figures, and every listed matrix."""
    axes = figures.Axes(height=figures.FIGURE)
    corners = {"x0": axes.x(0), "x1": axes.x(1), "y0": axes.y(0), "y1": axes.y(1)}
    return {"axes": corners, "matrices": [_drawn(row) for row in listed]}


def _drawn(row: Row) -> dict[str, Any]:
    # The change has digits of its own: a difference of rounded singular values would be the rounding's.
    drawn, limit, (low, high) = numbers.spectrum_of(row), figures.change_limit(row), figures.spectrum_range(row)
    digits = {"at": ".4g", "before": ".4g", "change": ".3g"}
    return {
        **{key: [float(format(one, digits[key])) for one in values] for key, values in drawn.items()},
        "range": [round(low, 4), round(high, 4)],
        "limit": limit,
        "ticks": [figures.spectrum_ticks(low, high), figures.change_ticks(limit)],
        "facts": facts(row),
    }


def _again(spectra: Mapping[str, Any]) -> dict[str, str]:
    """The command that makes the file again, and the one that writes the model without a part of its change."""
    compared = ["calibtrain", "spectra", str(spectra["base"]), str(spectra["tuned"])]
    options = []
    for key in ("null_seeds", "rank", "layers", "modules"):
        if (value := spectra["settings"].get(key)) is not None:
            options += ["--" + key.replace("_", "-"), str(value)]
    part = ["--write-without", "rotation", "--output", "DIR"]
    return {"command": shlex.join([*compared, *options]), "without": shlex.join([*compared, *part])}

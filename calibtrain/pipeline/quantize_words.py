"""What quantising cost, in words and as a table: for the terminal, and the sentences of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibtrain.abstention.words import percent
from calibtrain.pipeline import page
from calibtrain.pipeline.quantize_table import ROWS, Named
from calibtrain.pipeline.scope import at_least, at_most

Row = Mapping[str, Any]
COSTS = (
    ("disk_bytes", "Size on disk"),
    ("held_bytes", "Weights in memory"),
    ("peak_bytes", "Peak memory while answering"),
    ("tokens_per_second", "Tokens a second"),
)
LOADING = (
    "Memory and speed are those of calibtrain's own loading, which computes in full-precision arithmetic: an engine with "
    "kernels for this format holds less and is faster."
)


def told(content: Mapping[str, Any]) -> list[str]:
    """What a person must know before handing the model on, the most important first."""
    table = content["table"]
    return [
        _changed(table["questions"], table["changed"]),
        *_accuracy(table["rows"]["accuracy"]),
        *_kept_threshold(table["kept_threshold"], table["questions"]),
        _certified(content),
    ]


def _changed(n: int, changed: Row) -> str:
    if not changed["changed"]:
        return f"Of {n:,} questions all are answered as before."
    became = [
        (changed["right_to_wrong"], "right before and wrong now"),
        (changed["wrong_to_right"], "wrong before and right now"),
        (changed["wrong_to_wrong"], "wrong before and wrong in another way now"),
        (changed["right_to_right"], "right before and right in other words now"),
    ]
    parts = [f"{count:,} {words}" for count, words in became if count]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Of {n:,} questions {changed['changed']:,} are answered otherwise than before: {listed}."


def _accuracy(row: Row) -> list[str]:
    if row["difference"] is None:
        return []
    found = (
        f"It is right on {page.share(row['after'])} of them; in full precision it was on {page.share(row['before'])}"
    )
    noise = row["low"] is None or row["low"] <= 0 <= row["high"]
    if not row["difference"]:
        return [f"{found}."]
    return [f"{found}. {'That may be chance' if noise else 'Chance alone does not explain that difference'}."]


def _kept_threshold(kept: Mapping[str, Any] | None, n: int) -> list[str]:
    if kept is None:
        return []
    after = kept["after"]
    head = f"Had the old threshold of {percent(kept['threshold'])} been kept, it would answer {after['answered']:,} of {n:,}"
    if not after["answered"]:
        return [f"{head}."]
    wrong = after["wrong"] / after["answered"]
    promised = at_most(kept["promised"])
    between = f"{page.share(after['low'], 0)} to {page.share(after['high'], 0)}"
    verdict = (
        "more than promised"
        if after["low"] > kept["promised"]
        else "as promised here, though nobody has certified it"
        if after["high"] <= kept["promised"]
        else "these questions are too few to tell that from the promise"
    )
    return [
        f"{head}, {page.share(wrong)} of these wrong ({between}) where at most {promised} were promised: {verdict}. That "
        "threshold and its certificate were the full-precision model's, and are not carried over."
    ]


def _certified(content: Mapping[str, Any]) -> str:
    before, after = content["certificate_before"], content["certificate"]
    if after is None:
        had = (
            "The full-precision model had a certificate, and it is lost"
            if before
            else "Nor had the full-precision model"
        )
        return f"No certificate could be earned: {content['certification']}. {had}; without one it answers nothing."
    risk, sure = at_most(after["risk_bound"]), at_least(1 - after["delta"])
    earned = (
        f"Certified anew on its own answers: from {percent(after['threshold'])} on it answers "
        f"{page.share(after['coverage'], 0)} of the questions, at most {risk} of these wrong (confidence {sure})"
    )
    return f"{earned}; in full precision it answered {page.share(before['coverage'], 0)}." if before else f"{earned}."


def name_of(one: Named, risk: float) -> str:
    """A row's name, with the risk that it is about."""
    return f"Coverage at {at_most(risk)} risk, test" if one.key == "coverage" else one.name


def value(one: Named, found: float | None) -> str:
    """A cell of a row."""
    return page.share(found) if one.percent else page.number(found)


def difference(one: Named, row: Row) -> tuple[str, str]:
    """The difference, and its interval, "" where there is none."""

    def number(found: float) -> str:
        text = f"{100 * found:+.1f}" if one.percent else f"{found:+.3f}"
        return text.replace("-", "−")

    if row["difference"] is None:
        return "–", ""
    ends = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    return number(row["difference"]) + (" pts" if one.percent else ""), ends


def verdict(one: Named, row: Row) -> str:
    """better, worse or within noise; "" for a row that is neither good nor bad."""
    if not one.better or row["difference"] is None or row["low"] is None:
        return ""
    if row["low"] <= 0 <= row["high"]:
        return "within noise"
    return "better" if row["difference"] * one.better > 0 else "worse"


def table_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table as texts: name, hint, before, after, difference, interval, verdict."""
    table = content["table"]
    found = []
    for one in ROWS:
        row = table["rows"][one.key]
        change, interval = difference(one, row)
        found.append(
            {"name": name_of(one, table["risk"]), "hint": one.hint, "before": value(one, row["before"])}
            | {"after": value(one, row["after"]), "difference": change, "interval": interval}
            | {"verdict": verdict(one, row)}
        )
    return found


def changed_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Answers that are others than before, in all and by kind: name, count, share, its interval; then McNemar's p."""
    changed, row = content["table"]["changed"], content["table"]["rows"]["changed"]
    n, p = changed["n"], changed["mcnemar_p"]
    kinds = {
        "right_to_wrong": "right to wrong",
        "wrong_to_right": "wrong to right",
        "wrong_to_wrong": "wrong to another wrong",
        "right_to_right": "right in other words",
    }
    between = f"{page.share(row['low'])} to {page.share(row['high'])}"
    return [
        ("Answers changed", f"{changed['changed']:,}", page.share(row["after"]), between),
        *((name, f"{changed[key]:,}", page.share(changed[key] / n) if n else "–", "") for key, name in kinds.items()),
        ("chance of so uneven a turn", "p < 0.001" if p < 0.001 else f"p = {p:.3f}", "", "McNemar"),
    ]


def cost_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Size, memory and speed: name, before, after, ratio."""
    before, after = content["cost"]["before"], content["cost"]["after"]
    found = []
    for key, name in COSTS:
        if before.get(key) is None or after.get(key) is None:
            continue
        ratio = after[key] / before[key] if before[key] else None
        found.append((name, _amount(key, before[key]), _amount(key, after[key]), f"{ratio:.2f}×" if ratio else "–"))
    return found


def _amount(key: str, found: float) -> str:
    if key == "tokens_per_second":
        return f"{found:,.0f}"
    return f"{found / 1e9:.2f} GB" if found >= 1e9 else f"{found / 1e6:.1f} MB"


def print_table(content: Mapping[str, Any]) -> None:
    """The comparison on the terminal, before anything is handed over."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    n = content["table"]["questions"]
    title = f"{content['label']}, {content['method']}: {n:,} held-out questions"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("full prec.", "quantised", "difference", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows(content):
        table.add_row(*(row[key] for key in ("name", "before", "after", "difference", "interval")))
    table.add_section()
    for place, (name, count, share, between) in enumerate(changed_rows(content)):
        table.add_row(name if not place else f"  {name}", "", count, share, between)
    table.add_section()
    for cells in cost_rows(content):
        table.add_row(*cells)
    console.print(table)
    console.print(LOADING, style="dim")
    for sentence in told(content):
        console.print(sentence, markup=False)

"""A model that may refuse is made to answer as well: how many of its refusals were needless."""

from __future__ import annotations

from pathlib import Path

from calibtrain.confidence.forced import Forced, forced_answers
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.prepare import prepare


def run(config: RunConfig, *, model: Path | None, split: str) -> Forced:
    """Let a model that may refuse answer a split, force an answer where it does, and print refusals and over-refusals."""
    prepared = prepare(config)
    records = prepared.splits[split]
    if not records:
        raise UserError(f"data.splits.{split}: 0 questions; ask for some in the config")
    loaded = Loaded(config, model)
    shots = () if model is not None else prepared.shots
    found = forced_answers(loaded.model, loaded.template, records, config.evaluation, shots=shots, device=loaded.device)
    _print(found, f"{model or config.model.source}, {split}")
    return found


def _print(found: Forced, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    statistics, (refused, right, low, high) = found.statistics, found.over_refusal
    rows = {
        "questions": str(statistics.n),
        "refused": f"{statistics.refusal_rate:.1%}",
        "answered wrongly, of all": f"{statistics.hallucination_rate:.1%}",
        "wrong among the given": f"{statistics.risk:.1%} ({statistics.risk_low:.1%} to {statistics.risk_high:.1%})",
        "refused though it knew": f"{refused} of {right} ({low:.1%} to {high:.1%})",
    }
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)

"""metrics.jsonl: every number of the run, one JSON object a line, complete also when the job is killed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibtrain.hooks.base import Hook
from calibtrain.hooks.records import EndRecord, EvaluationRecord, LogRecord, RunRecord, SpectraRecord
from calibtrain.lines import lines_of


class JsonlHook(Hook):
    """Appends `{"event", "step", ...metrics}` to output_dir/metrics.jsonl on rank 0.

    A resumed run keeps the lines that the checkpoint knows of and writes the others again, a fresh run starts an empty
    file. NaN and infinities are written as null.
    """

    name = "jsonl"

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lines = 0

    def on_start(self, record: RunRecord) -> None:
        """Open the file at the resumed step."""
        if record.rank != 0:
            return
        path = record.output_dir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path)[: self._lines] if record.first_step else []
        replacement = path.with_suffix(".jsonl.tmp")
        replacement.write_text("".join(map(_line, kept)), encoding="utf-8", errors="backslashreplace")
        os.replace(replacement, path)
        self._path, self._lines = path, len(kept)

    def state_dict(self) -> dict[str, Any]:
        """How many lines there are: a step does not tell what was written before its checkpoint and what after."""
        return {"lines": self._lines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the number of lines to keep."""
        self._lines = state["lines"]

    def on_log(self, record: LogRecord) -> None:
        """One line of training metrics."""
        self._append({"event": "log", "step": record.step, **record.metrics})

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """One line of evaluation metrics."""
        self._append({"event": "evaluation", "step": record.step, "split": record.split, **record.metrics})

    def on_spectra(self, record: SpectraRecord) -> None:
        """One line of the readings of matrices."""
        self._append({"event": "spectra", "step": record.step, **record.metrics()})

    def on_end(self, record: EndRecord) -> None:
        """One line with the summary and the cause, if training failed."""
        self._append({"event": "end", "step": record.step, "error": record.error, "summary": dict(record.summary)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            # Half of a surrogate pair becomes \ud83d, which is how JSON writes it.
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(_line(entry))
            self._lines += 1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Objects of a metrics.jsonl in order, [] where there is no file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in lines_of(path.read_text(encoding="utf-8")):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(entry), ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

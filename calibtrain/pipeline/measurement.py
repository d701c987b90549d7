"""Graded answers and the files that hold them, one JSON a line: written whole or not at all, and read as other people's."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calibtrain.calibration.scores import TEMPERATURE_GRID, Scores, TokenScores, scores_of
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.head import FittedHead
from calibtrain.errors import UserError, short
from calibtrain.lines import lines_of
from calibtrain.pipeline.options import option_matrices


@dataclass(frozen=True, slots=True)
class Measurement:
    """Graded answers and their log-probs at each temperature of TEMPERATURE_GRID."""

    answers: list[Answer]
    table: NDArray[np.float64]  # (answers, temperatures); (answers, 0) of an engine, which tells temperature 1 alone
    tokens: TokenScores | None = None  # kept for calibration.method: adaptive_temperature alone
    made_by: str | None = None  # mark of the model and template that gave all of them, where a file says so
    states: NDArray[np.float32] | None = None  # (answers, H): `Answered.asked`; not in a file
    told: NDArray[np.float64] | None = None  # (answers,) what the run's confidence head tells, where asked
    told_by: str | None = None  # mark of that head

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Grades (answers,)."""
        return np.array([bool(answer.correct) for answer in self.answers], dtype=bool)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Likelihood of each answer (answers,), before any temperature."""
        return np.array([answer.confidence for answer in self.answers], dtype=np.float64)

    def told_of(self, head: FittedHead) -> NDArray[np.float64] | None:
        """What this very head told of the answers (answers,); None where another one did, or none."""
        return self.told if self.told_by == head.mark else None

    def scores(self, domain: str | None = None) -> Scores:
        """What a calibrator sees; `domain` names the stratum that is a question's domain ("" where it has none)."""
        names = None if domain is None else [answer.strata.get(domain, "") for answer in self.answers]
        options, right = option_matrices(self.answers)
        others: dict[str, Any] = {"domains": names, "options": options, "right": right, "tokens": self.tokens}
        if self.table.shape[1]:
            return scores_of(self.table, **others)
        return scores_of(logprob=[answer.logprob for answer in self.answers], **others)


def write_measurement(measurement: Measurement, path: Path, made_by: str | None = None) -> None:
    """One JSON object per answer, whole or not at all; `logprobs_at` is its log-prob at each temperature of the grid.

    made_by: mark of the model and template, without which nothing can be certified by these answers. `told`: what the
    confidence head told, where it did, and `told_by` its mark. Scores of the tokens, where kept, lie beside it as
    .tokens.safetensors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Half of a surrogate pair becomes \ud83d, which is how JSON writes it.
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        told: list[float | None] = [None] * len(measurement.answers)
        told = told if measurement.told is None else measurement.told.tolist()
        for answer, row, said in zip(measurement.answers, measurement.table.tolist(), told, strict=True):
            line = {**answer.as_dict(), "logprobs_at": [round(value, 6) for value in row], "made_by": made_by}
            line |= {} if said is None else {"told": said, "told_by": measurement.told_by}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    _tokens_file(path).unlink(missing_ok=True)  # an earlier file's
    if measurement.tokens is not None:
        tokens = asdict(measurement.tokens)
        save_file({name: np.ascontiguousarray(array) for name, array in tokens.items()}, _tokens_file(path))
    os.replace(partial, path)


def move_measurement(path: Path, target: Path | None) -> None:
    """Let the answers of `path` take the place of those at `target`; None removes them."""
    if target is None:
        path.unlink()
        _tokens_file(path).unlink(missing_ok=True)
        return
    _tokens_file(target).unlink(missing_ok=True)
    if _tokens_file(path).is_file():
        os.replace(_tokens_file(path), _tokens_file(target))
    os.replace(path, target)


def read_measurement(path: Path) -> Measurement:
    """Answers that `write_measurement` wrote. Raises UserError when the file is missing or not its work."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `calibtrain calibrate` first")
    answers, table, marks, told, heads = [], [], set(), [], set()
    for number, line in enumerate(lines_of(_text(path)), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["correct"], bool | None):
                raise ValueError(f"`correct` is {row['correct']!r}; say true, false or null")
            table.append(_numbers(row.pop("logprobs_at"), "logprobs_at"))
            if len(table[-1]) not in ({0, len(TEMPERATURE_GRID)} if len(table) == 1 else {len(table[0])}):
                wanted = f"{len(table[0])}, as in line 1" if len(table) > 1 else f"{len(TEMPERATURE_GRID)}, or none"
                raise ValueError(f"`logprobs_at` holds {len(table[-1])} numbers; it is {wanted}")
            marks.add(row.pop("made_by", None))
            heads.add(row.pop("told_by", None))
            if (said := row.pop("told", None)) is not None:
                if not 0.0 <= float(said) <= 1.0:
                    raise ValueError(f"`told` is {said!r}; it is a probability")
                told.append(float(said))
            _check_types(row)
            answers.append(Answer.from_dict(row))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{path}:{number}: not a graded answer ({error}); such files are written by `calibtrain calibrate` and "
                "`calibtrain evaluate --output`"
            ) from error
    tokens = TokenScores(**load_file(_tokens_file(path))) if _tokens_file(path).is_file() else None
    width = 0 if table and not any(table) else len(TEMPERATURE_GRID)
    grid = np.array(table, dtype=np.float64).reshape(len(answers), width)
    by_head: dict[str, Any] = {}
    if answers and len(told) == len(answers) and len(heads) == 1:
        by_head = {"told": np.array(told), "told_by": heads.pop()}
    return Measurement(answers, grid, tokens, marks.pop() if len(marks) == 1 else None, **by_head)


def _check_types(row: dict[str, Any]) -> None:
    """Raise ValueError that names the key where a value is not what answers are made of."""
    for key in ("token_logprobs", "option_logprobs"):
        _numbers(row.get(key, []), key)
    for key in ("accepted", "tokens", "options"):
        if not isinstance(row.get(key, []), list) or not all(isinstance(one, str) for one in row.get(key, [])):
            raise ValueError(f"`{key}` is {short(row[key])}; it is a list of texts")
    for key in ("question_id", "question", "text"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"`{key}` is {short(row[key])}; it is text")
    if not isinstance(row.get("strata", {}), dict):
        raise ValueError(f"`strata` is {short(row['strata'])}; it is an object")


def _numbers(values: Any, key: str) -> list[float]:
    """The values as floats. Raises ValueError, or OverflowError, where they are no list of numbers."""
    if not isinstance(values, list) or not all(type(one) in (int, float) for one in values):
        raise ValueError(f"`{key}` is {short(values)}; it is a list of numbers")
    found = [float(one) for one in values]
    if any(one != one for one in found):
        raise ValueError(f"`{key}` holds NaN")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); give graded answers, one JSON a line") from error


def _tokens_file(path: Path) -> Path:
    """Where the per-token scores of an answers file lie."""
    return path.with_suffix(".tokens.safetensors")

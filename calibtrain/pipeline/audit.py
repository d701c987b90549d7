"""A random sample of judged answers for a person to grade: OUT/audit.jsonl, and what it says of the answers it is of.

The sample is a fixed random order of the certification questions, a pure function of their ids, and its size is fixed when
it is drawn: a person grades all of it. Were a certificate asked for after each few lines, one of many looks would pass by
luck, and a choice of lines would be no random sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.lines import lines_of
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.records import unit_hash
from calibtrain.tasks.kinds import task_of

FILE = "audit.jsonl"
VERDICTS = {True: "right", False: "wrong", None: "unread"}


@dataclass(frozen=True, slots=True)
class Audit:
    """A person's grades of judged answers."""

    grades: NDArray[np.float64]  # (answers,) 1 right, 0 wrong, NaN where not audited
    problem: str = ""  # why there are none
    digest: str = ""  # of the lines that they stand in


def run(output_dir: Path, n: int) -> Path:
    """Write OUT/audit.jsonl: n certification answers, `correct` to be filled in. Raises UserError where one is there."""
    path, answers = output_dir / FILE, output_dir / "answers" / "certification.jsonl"
    if not task_of(config_of_run(output_dir).task).judged:
        raise UserError(f"{output_dir}: its grades are no opinions of a judge; there is nothing to audit")
    found = read_measurement(answers).answers
    if n > len(found):
        raise UserError(f"--n: {n} of {len(found)} certification answers; ask for {len(found)} at most")
    rows = [
        {
            "question_id": one.question_id,
            "question": one.question,
            "accepted": list(one.accepted),
            "answer": one.text,
            "correct": None,
            "verdict": VERDICTS[one.correct],
        }
        for one in (found[index] for index in sample_order(found)[:n])
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path}: is there already, and may hold a person's work; move it away for a new one") from None
    return path


def sample_order(answers: Sequence[Answer]) -> list[int]:
    """Places of the answers in the order in which they are audited."""
    return sorted(range(len(answers)), key=lambda index: unit_hash("audit", answers[index].question_id))


def read_audit(path: Path) -> list[dict[str, Any]] | None:
    """The lines, graded from the top, `correct` being None where not yet; None without the file. UserError for no audit."""
    if not path.is_file():
        return None
    try:
        lines = lines_of(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    rows: list[dict[str, Any]] = []
    open_at = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known = {key: row[key] for key in ("question_id", "answer", "correct")}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: no line of an audit ({type(error).__name__}: {error})") from error
        if not isinstance(known["correct"], bool | None):
            raise UserError(f"{path}:{number}: `correct` is {known['correct']!r}; say true, false, or null for not yet")
        if known["correct"] is None:
            open_at = open_at or number
        elif open_at:
            raise UserError(
                f"{path}:{open_at}: `correct` is null, but line {number} is graded; grade from the top without leaving any "
                "out, since a choice is no random sample"
            )
        rows.append(known)
    return rows


def audit_of(config: RunConfig, answers: Sequence[Answer], output_dir: Path) -> Audit | None:
    """What OUT/audit.jsonl says of these answers; None where their grades are no judge's, and need no audit."""
    if not task_of(config.task).judged:
        return None
    path = output_dir / FILE
    return matched(read_audit(path), answers, output_dir)


def matched(rows: Sequence[dict[str, Any]] | None, answers: Sequence[Answer], output_dir: Path) -> Audit:
    """The graded lines laid beside the answers; of other answers, in another order, or not all: a problem."""
    none, path = np.full(len(answers), np.nan), output_dir / FILE
    how = f"let a person fill in `correct` in {path} from the top, then run `calibtrain certify {output_dir}`"
    if rows is None:
        return Audit(
            none, f"the grades are a judge's, and none was audited; run `calibtrain audit {output_dir}`, {how}"
        )
    graded = _graded(rows)
    if not graded:
        return Audit(none, f"the grades are a judge's, and none was audited; {how}")
    grades, order = none.copy(), sample_order(answers)
    for number, row in enumerate(graded, start=1):
        one = answers[order[number - 1]] if number <= len(order) else None
        if one is None or (one.question_id, one.text) != (row["question_id"], row["answer"]):
            why = f"{path}: graded line {number} is not the one of these answers"
            return Audit(
                none, f"{why}; move the file away and run `calibtrain audit {output_dir}` for the answers of now"
            )
        grades[order[number - 1]] = row["correct"]
    problem = ""
    if len(graded) < len(rows):
        problem = (
            f"{len(graded)} of the {len(rows)} answers in {path} are audited: grade all of them. A certificate holds for a "
            "sample of a size that was fixed beforehand, not for one that ends when it looks well"
        )
    return Audit(grades, problem, digest_of(rows))


def digest_of(rows: Sequence[dict[str, Any]] | None) -> str:
    """SHA-256 of graded lines: another one where a person graded more of them, or graded one otherwise."""
    return hashlib.sha256(json.dumps(_graded(rows or []), sort_keys=True).encode()).hexdigest()


def _graded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["correct"] is not None]

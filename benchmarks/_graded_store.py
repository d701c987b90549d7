"""Graded answers with what a confidence head reads of them, on disk: made once, in blocks, so that a cut run goes on.

A folder holds blocks of BLOCK answers, `00000.safetensors`, `02048.safetensors`, ...: states (float16), readings, log-probs,
grades, the log-prob at each temperature of the grid, and as metadata the questions' ids and texts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.head import HeadInputs
from calibtrain.records import Record

BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Graded:
    """Graded answers (N,) in the order of their questions."""

    inputs: HeadInputs
    correct: NDArray[np.bool_]
    table: NDArray[np.float64]  # (N, temperatures) log-prob of each answer at each temperature of the grid
    tokens: NDArray[np.int64]  # (N,) of the answer
    ids: list[str]
    questions: list[str]
    seconds: float = 0.0  # of processor time that answering took

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Graded:
        """Those at `rows`; their seconds in proportion."""
        where, one = np.asarray(rows, dtype=np.int64), self.inputs
        return Graded(
            HeadInputs(one.logprob[where], one.readings[where], one.states[where]),
            self.correct[where],
            self.table[where],
            self.tokens[where],
            [self.ids[row] for row in where],
            [self.questions[row] for row in where],
            self.seconds * len(where) / max(1, len(self)),
        )

    def with_layers(self, places: Sequence[int]) -> Graded:
        """With the states of some of the stored layers alone."""
        one = self.inputs
        inputs = HeadInputs(one.logprob, one.readings, one.states[:, list(places)])
        return Graded(inputs, self.correct, self.table, self.tokens, self.ids, self.questions, self.seconds)


def joined(parts: Sequence[Graded]) -> Graded:
    """One behind the other."""
    inputs = [part.inputs for part in parts]
    whole = HeadInputs(*(np.concatenate([getattr(one, name) for one in inputs]) for name in HeadInputs.__slots__))
    return Graded(
        whole,
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.table for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        [name for part in parts for name in part.ids],
        [text for part in parts for text in part.questions],
        sum(part.seconds for part in parts),
    )


def answer_into(
    folder: Path, loaded: Any, records: Sequence[Record], layers: tuple[int, ...], shots: Sequence[Record] = ()
) -> None:
    """Let a `Loaded` model answer `records` a block at a time; blocks that are there are not made again."""
    from safetensors.numpy import save_file

    from calibtrain.confidence.answered import answer_table

    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(records), BLOCK):
        some, path = list(records[start : start + BLOCK]), folder / f"{start:05d}.safetensors"
        if path.is_file():
            continue
        clock, used = time.perf_counter(), time.process_time()
        found = loaded.answer(some, shots, layers=layers)
        used = time.process_time() - used
        table = answer_table(loaded.model, found, device=loaded.device).numpy()
        inputs = HeadInputs.of(found)
        arrays = {
            "states": inputs.states.astype(np.float16),
            "readings": inputs.readings.astype(np.float32),
            "logprob": inputs.logprob,
            "table": table,
            "tokens": np.array([len(one.token_logprobs) for one in found.answers], dtype=np.int64),
            "correct": np.array([bool(one.correct) for one in found.answers], dtype=np.uint8),
        }
        facts = {"ids": [one.id for one in some], "questions": [one.question for one in some], "seconds": used}
        facts |= {"layers": list(layers)}
        partial = path.with_suffix(".partial")
        save_file(arrays, partial, {key: json.dumps(value) for key, value in facts.items()})
        os.replace(partial, path)
        print(f"{folder.name}: {len(some)} answers, {time.perf_counter() - clock:.0f} s", flush=True)


def read(folder: Path) -> Graded:
    """What `answer_into` left."""
    parts = [_block(path) for path in sorted(folder.glob("*.safetensors"))]
    if not parts:
        raise SystemExit(f"{folder}: no graded answers")
    return parts[0] if len(parts) == 1 else joined(parts)


def _block(path: Path) -> Graded:
    from safetensors.numpy import safe_open

    with safe_open(path, "numpy") as file:
        arrays, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    inputs = HeadInputs(arrays["logprob"], arrays["readings"], arrays["states"])
    told = {key: json.loads(value) for key, value in facts.items()}
    return Graded(
        inputs, arrays["correct"].astype(bool), arrays["table"], arrays["tokens"], told["ids"], told["questions"],
        told["seconds"],
    )  # fmt: skip

"""A rank that fails says why: on stderr and in <output_dir>/errors/rank<k>.txt, and then really ends."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from calibtrain.errors import PREEMPTED, Preempted, UserError, told

END_GRACE_SECONDS = 15.0
"""A failing rank gets this long to close its trackers; a collective that hangs at exit does not keep it alive."""


def error_directory(output_dir: Path) -> Path:
    """Where the ranks' last words are kept."""
    return output_dir / "errors"


def clear_errors(output_dir: Path, rank: int | None = None) -> None:
    """Forget the last words of an earlier run: all of them, or those of one rank."""
    pattern = "rank*.txt" if rank is None else f"rank{rank}.txt"
    for old in error_directory(output_dir).glob(pattern):
        old.unlink(missing_ok=True)


def report_error(error: BaseException, output_dir: Path | None, rank: int) -> int:
    """Write the cause to stderr and to the rank's file.

    Returns the exit code: 2 for a user's mistake, PREEMPTED for a run that stopped as it was asked to, else 1.
    """
    if isinstance(error, UserError | Preempted):
        code, text = 2 if isinstance(error, UserError) else PREEMPTED, told(str(error))
    else:
        code, text = 1, "".join(traceback.format_exception(error)).rstrip()
    first_words = None
    if output_dir is not None:
        try:
            error_directory(output_dir).mkdir(parents=True, exist_ok=True)
            (error_directory(output_dir) / f"rank{rank}.txt").write_text(f"exit code {code}\n{text}\n", "utf-8")
            first_words = _words_of(output_dir, 0) if rank else None
        except OSError as failure:  # a full disk is often the very cause
            text += f"\n(could not be written to {error_directory(output_dir)}: {failure})"
    if first_words != text:  # every rank meets the same mistake; once is enough
        print(text if rank == 0 else f"[rank {rank}] {text}", file=sys.stderr, flush=True)
    return code


def error_summary(output_dir: Path) -> str:
    """The causes that ranks left behind, earliest first, each once; "" when there are none."""
    directory = error_directory(output_dir)
    files = sorted(directory.glob("rank*.txt"), key=lambda file: file.stat().st_mtime)
    causes: dict[str, list[str]] = {}
    for file in files:
        words = file.read_text("utf-8").partition("\n")[2].strip()
        causes.setdefault(words.splitlines()[-1] if words.startswith("Traceback") else words, []).append(file.stem)
    lines = [f"{', '.join(ranks)}: {cause}" for cause, ranks in causes.items()]
    return "\n".join([*lines, f"Whole tracebacks: {directory}"]) if lines else ""


def was_preempted(output_dir: Path) -> bool:
    """Whether every rank that left last words had stopped as it was asked to."""
    files = list(error_directory(output_dir).glob("rank*.txt"))
    return bool(files) and all(file.read_text("utf-8").startswith(f"exit code {PREEMPTED}\n") for file in files)


def end_within(seconds: float, code: int) -> None:
    """End this process with `code` after `seconds`, even when the interpreter hangs in a collective while exiting."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end-of-process").start()


def end_without_teardown() -> Callable[[int], int]:
    """Have this process end behind its exit handlers, before Python takes itself apart. Call it first of all.

    Threads of torch, gloo or NCCL that still run would be ended in the middle by the interpreter, which aborts the process:
    a job that is done must not end with an error, nor a user's mistake with another code. Returns what notes the code.
    """
    codes = [1]

    def end() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(codes[-1])

    def note(code: int) -> int:
        codes.append(code)
        return code

    atexit.register(end)  # handlers run last in, first out
    return note


def _words_of(output_dir: Path, rank: int) -> str | None:
    for _ in range(10):  # rank 0 meets the same mistake at about the same time
        file = error_directory(output_dir) / f"rank{rank}.txt"
        if file.is_file():
            return file.read_text("utf-8").partition("\n")[2].rstrip("\n")
        time.sleep(0.1)
    return None

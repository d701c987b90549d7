"""Starts real gloo ranks with a hard deadline, in a process group of their own, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400


@dataclass(frozen=True, slots=True)
class Ended:
    """How a launch ended; `output` is stdout and stderr together."""

    code: int
    output: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for ranks on CPU, without W&B credentials or a launcher's leftovers."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return {
        **clean,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "NETRC": os.devnull,
        **changes,
    }


def torchrun(ranks: int, *program: str) -> list[str]:
    """Command line that starts `program` (a script, or -m and a module, with arguments) on `ranks` ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *program]


def forked(ranks: int, script: str, *arguments: str) -> list[str]:
    """Command line that runs `script` on `ranks` ranks, which share one process's imports."""
    return [sys.executable, str(Path(__file__).with_name("forked.py")), str(ranks), script, *arguments]


def run(
    argv: Sequence[str],
    folder: Path,
    seconds: float = SECONDS,
    env: dict[str, str] | None = None,
    watch: Callable[[int], bool] | None = None,
) -> Ended:
    """Run `argv` to its end, or until `watch` (given its pid, asked ten times a second) says to kill the whole group.

    Raises AssertionError past the deadline. Whatever happened, no process of the group is alive afterwards.
    """
    log = folder / f"launch-{time.monotonic_ns()}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            argv, stdout=sink, stderr=subprocess.STDOUT, env=env or environment(), cwd=folder, start_new_session=True
        )
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None:
                if watch is not None and watch(process.pid):
                    ranks = descendants(process.pid)  # in sessions of their own: their parent alone leads to them
                    os.killpg(process.pid, signal.SIGKILL)
                    for one in ranks:
                        _kill(one)
                    break
                if time.monotonic() > deadline:
                    raise AssertionError(f"no end within {seconds} s:\n{log.read_text('utf-8', 'replace')[-6000:]}")
                time.sleep(0.1)
        finally:
            for one in descendants(process.pid):
                _kill(one)
            _kill_group(process.pid)
            process.wait()
    return Ended(process.returncode, log.read_text("utf-8", "replace"))


def descendants(pid: int) -> list[int]:
    """Processes of the session that `pid` leads, and children of it in sessions of their own."""
    stats: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                stats[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found: set[int] = set()
    while True:
        more = {
            one for one, (parent, session) in stats.items() if session == pid or parent == pid or parent in found
        } - found
        if not more:
            return sorted(found - {pid})
        found |= more


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)

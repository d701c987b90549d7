"""Ranks of one program as forks of one process, which has imported what takes each of them seconds. Run by `ranks.forked`.

Usage: forked.py RANKS SCRIPT [ARGUMENT...]. As under torchrun each rank finds its place in the environment, and where one
fails the others are ended. What is about launching itself goes through torchrun, as users do.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import sys
import time

AHEAD = (
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "calibtrain.pipeline.calibrate",
    "calibtrain.pipeline.train",
)
"""What every rank would import."""
ENDS_SECONDS = 10.0


def main(ranks: int, script: str, arguments: list[str]) -> int:
    """0 where all ranks ended well, else 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in AHEAD:
        importlib.import_module(name)
    pids = set()
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = [script, *arguments]
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
            return 0  # of this rank, which ends as any process does
        pids.add(pid)
    return watched(pids)


def watched(pids: set[int]) -> int:
    """Wait for the ranks; where one fails, end those that are left."""
    code, deadline = 0, float("inf")
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
            if time.monotonic() > deadline:
                told(pids, signal.SIGKILL)
            continue
        pids.discard(pid)
        if status and not code:
            code, deadline = 1, time.monotonic() + ENDS_SECONDS
            told(pids, signal.SIGTERM)
    return code


def told(pids: set[int], number: int) -> None:
    """Send a signal to each."""
    for pid in pids:
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

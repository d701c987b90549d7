"""Start N training processes on this machine through the deepspeed launcher, and pass its exit code on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from calibtrain.errors import PREEMPTED
from calibtrain.launchers.errors import clear_errors, error_summary, was_preempted

TRAIN_MODULE = "calibtrain.launchers.train"


def local_argv(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_processes: int,
    port: int,
    visible_devices: str | None = None,
) -> list[str]:
    """Command line of the deepspeed launcher for `num_processes` ranks on this machine; no shell reads it.

    One rank needs no launcher, whose two processes hold half a gigabyte. `visible_devices` is CUDA_VISIBLE_DEVICES:
    deepspeed ignores it beside --num_gpus, so that the devices are named.
    """
    if num_processes == 1:
        return [sys.executable, "-u", "-m", TRAIN_MODULE, str(config), *overrides]
    devices = [device for device in (visible_devices or "").split(",") if device.strip()]
    if len(devices) >= num_processes:
        where = ["--include", f"localhost:{','.join(devices[:num_processes])}"]
    else:
        where = ["--num_accelerators", str(num_processes)]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--hostfile=",  # never the machine's /job/hostfile: these ranks are local
        *where,
        f"--master_port={port}", "--quiet", "--no_local_rank", "--module", TRAIN_MODULE, str(config), *overrides,
    ]  # fmt: skip


def local_environment(environment: Mapping[str, str], *, num_processes: int, gpus: int) -> dict[str, str]:
    """The environment of the ranks: on CPU the cores are shared out, and DeepSpeed is told not to look for a GPU."""
    result = dict(environment)
    if gpus == 0:
        result.setdefault("DS_ACCELERATOR", "cpu")
        result.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
        # A step's buffers stay in the heap for the next one: mapping them afresh costs a quarter of a step. The
        # trainer gives back what is free every few steps (training/host_memory.py).
        result.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
        result.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
    return result


def launch(config: str | Path, overrides: Sequence[str], *, num_processes: int, output_dir: Path) -> int:
    """Train on `num_processes` local ranks and return the exit code of the job.

    0; 2 for a user's mistake; 75 where it stopped as it was asked to (SIGTERM), with a checkpoint; else 1..255.

    When a rank ends with an error the launcher ends the others; the causes, by rank, are printed last.
    """
    gpus = gpu_count()
    clear_errors(output_dir)
    argv = local_argv(
        config,
        overrides,
        num_processes=num_processes,
        port=free_port(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES") if gpus else None,
    )
    code = run(argv, local_environment(os.environ, num_processes=num_processes, gpus=gpus))
    if code and was_preempted(output_dir):  # the deepspeed launcher has codes of its own
        code = PREEMPTED
    if code:
        print(explain(code, output_dir), file=sys.stderr)
    return code


def run(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a launcher to its end; an interrupt or a termination of this process reaches the ranks. Returns its exit code."""
    child = subprocess.Popen(argv, env=dict(environment))

    def forward(number: int, _frame: object) -> None:
        # The launcher would die of SIGTERM at once, and leave its ranks behind: they end in order, and then it does.
        ranks = ranks_below(child.pid) if number == signal.SIGTERM else []
        for process in ranks or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def ranks_below(pid: int) -> list[int]:
    """Process ids of the training processes that `pid` has started, itself among them; launchers between are left out."""
    import psutil

    found = []
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []
    for process in tree:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if TRAIN_MODULE in words and not any(word.startswith("deepspeed.launcher") for word in words):
                found.append(process.pid)
    return found


def explain(code: int, output_dir: Path) -> str:
    """What ended a job, for people: the signal that killed a rank, then what the ranks themselves could still say."""
    causes = error_summary(output_dir)
    if code == PREEMPTED:
        return next(iter(causes.splitlines()), f"Training stopped as it was asked to (exit code {code}).")
    killed = 256 - code if code > 192 else code - 128 if code > 128 else 0
    if killed == signal.SIGKILL:
        killed_by = "A training process was killed (signal 9): most often the machine ran out of memory."
    elif killed:
        killed_by = f"A training process was ended by signal {killed}."
    elif causes:
        return causes
    else:
        return f"Training ended with exit code {code}; the cause is above."
    return "\n".join([killed_by, *(["The others then said:", causes] if causes else [])])


def gpu_count() -> int:
    """GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    """A TCP port nobody listens on, so that two jobs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

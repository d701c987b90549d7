"""Do training processes end well on a busy machine? Starts and ends pairs of ranks and counts their exit codes.

python benchmarks/starts_and_ends.py [--starts 50] [--as-before] [--json PATH]

Each start is two ranks that join a gloo group, take steps with DeepSpeed and leave. Beside them every core is kept busy,
and gloo's workers get a core last (SCHED_IDLE), so that what a loaded machine does once in thousands of starts happens
often. --as-before lets the ranks end without `leave_world`. Linux. Summary: `starts`, `aborted`, `codes`, `seconds`.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import deepspeed
import torch
import torch.distributed as dist

from calibtrain.config import RunConfig
from calibtrain.distributed import leave_world, start_world
from calibtrain.launchers.local import free_port
from calibtrain.training.deepspeed_config import deepspeed_dict

RANKS = 2
DEADLINE = 120  # seconds that a rank may take


def rank(number: int, port: int, as_before: bool) -> None:
    """Join, take a step, reduce tensors that Python owns as the very last thing, and end."""
    signal.alarm(DEADLINE)
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    start_world()
    if as_before:
        atexit.unregister(leave_world)
    model = torch.nn.Linear(8, 8)
    config = RunConfig.model_validate({"model": {"dtype": "fp32"}, "training": {"micro_batch_size": 1}})
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_dict(config, RANKS))
    engine.backward(engine(torch.randn(2, 8)).square().sum())
    engine.step()
    yield_cores()
    last_words()
    sys.exit(0)


def last_words() -> None:
    """Collectives whose tensors nobody holds afterwards but the worker that has reduced them."""
    for _ in range(2):
        sums = torch.ones(1000)
        sums.owned = torch.ones(1)  # type: ignore[attr-defined]
        dist.all_reduce(sums)
        del sums


def yield_cores() -> None:
    """Let gloo's workers of this process run only where nobody else wants to."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "pt_gloo_runloop":
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))


def start(as_before: bool) -> list[int]:
    """Exit codes of the ranks of one start; negative is a signal."""
    port, pids = free_port(), []
    for number in range(RANKS):
        pid = os.fork()
        if pid == 0:
            rank(number, port, as_before)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def keep_busy() -> int:
    """A process that takes all of a core."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(1800)
        while True:
            pass
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--as-before", action="store_true", help="end without leaving the group")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parent = os.getpid()
    busy = [keep_busy() for _ in range(os.cpu_count() or 1)]
    started, codes = time.monotonic(), Counter[int]()
    try:
        for _ in range(arguments.starts):
            codes.update(start(arguments.as_before))
    finally:
        if os.getpid() == parent:
            for pid in busy:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    aborted = sum(count for code, count in codes.items() if code)
    summary = {
        "starts": arguments.starts,
        "aborted": aborted,
        "codes": {str(code): count for code, count in sorted(codes.items())},
        "seconds": round(time.monotonic() - started, 1),
    }
    print(f"{summary['starts']} starts of {RANKS} ranks: {aborted} ended with an error, exit codes {summary['codes']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return 1 if aborted else 0


if __name__ == "__main__":
    sys.exit(main())

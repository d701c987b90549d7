"""Where the seconds of a training step go: products, attention, head, optimiser, communication, waiting."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from calibtrain.launchers.local import local_environment

SHARES = ("products", "attention", "head", "optimiser", "communication", "rest", "waiting")
"""`products`: the layers' linear maps; `communication`: collectives, with the wait for the other rank in them; `rest`:
norms, activations, copies, bookkeeping; `waiting`: cores that idle elsewhere."""
PROFILED_STEPS = 3
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter_tensor", "broadcast")


def measure_shares(
    make_trainer: Callable[..., Any], model: Path, shape: str, precision: str, ranks: int, threads: int
) -> dict[str, Any]:
    """Seconds of a step on `ranks` processes that share `threads` cores, and rank 0's shares of it."""
    context = get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"OMP_NUM_THREADS": str(max(1, threads // ranks))}
    before = dict(os.environ)
    os.environ.update(local_environment(settings, num_processes=ranks, gpus=0))
    pipe, theirs = context.Pipe()
    processes = [
        context.Process(
            target=_rank,
            args=(theirs if rank == 0 else None, rank, ranks, port, make_trainer, model, shape, precision),
            daemon=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        found = dict(pipe.recv())
    finally:
        for process in processes:
            process.join(timeout=30)
            process.terminate()
        os.environ.clear()
        os.environ.update(before)
    return {"shape": shape, "dtype": precision, "ranks": ranks, **found}


def _rank(
    pipe: Connection | None,
    rank: int,
    ranks: int,
    port: int,
    make_trainer: Callable[..., Any],
    model: Path,
    shape: str,
    precision: str,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from dataclasses import replace

    import torch

    from calibtrain.training.checkpoint import Progress

    trainer = make_trainer(model, shape, "completion", lambda config: [], precision=precision)
    for name in ("step", "set_learning_rate"):
        setattr(trainer.engine, name, _named("optimiser", getattr(trainer.engine, name)))
    for name in COLLECTIVES:
        setattr(torch.distributed, name, _named("communication", getattr(torch.distributed, name)))
    progress = replace(trainer, total_steps=2).fit(Progress())
    started, busy = time.perf_counter(), time.process_time()
    progress = replace(trainer, total_steps=progress.step + PROFILED_STEPS).fit(progress)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        replace(trainer, total_steps=progress.step + PROFILED_STEPS).fit(progress)
    torch.distributed.barrier()
    if pipe is not None:
        idle = max(0.0, 1.0 - busy / (seconds * torch.get_num_threads()))
        pipe.send({"seconds": seconds / PROFILED_STEPS, **shares(profile.events(), idle)})
    torch.distributed.destroy_process_group()


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.profiler.record_function(f"calibtrain/{name}"):
            return function(*args, **kwargs)

    return inside


def shares(events: Any, idle: float) -> dict[str, float]:
    """Share of each part in the profiled time, cut down by the share of the cores' time that is idle."""
    spent: Counter[str] = Counter()
    for event in events:
        spent[_part(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    found = {name: spent[name] / total for name in SHARES if name != "waiting"}
    waiting = max(0.0, idle - found["communication"])  # cores that wait in a collective are counted there
    return {**{name: share * (1.0 - waiting) for name, share in found.items()}, "waiting": waiting}


def _part(event: Any) -> str:
    """The part of the innermost operation around the event that says what it is for."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    if "calibtrain/communication" in names or any("c10d" in name for name in names):
        return "communication"
    if "calibtrain/optimiser" in names:
        return "optimiser"
    if any("linear_token_stats" in name for name in names):
        return "head"
    if any("scaled_dot_product" in name or name in ("aten::bmm", "aten::_softmax") or "softmax_backward" in name
           for name in names):  # fmt: skip
        return "attention"
    return "products" if names[0] in ("aten::mm", "aten::addmm") else "rest"

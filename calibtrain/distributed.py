"""Ranks, devices and the few collectives of the loop; everything here also works without a launcher, as one rank."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer for the others gives up; it must outlast the slowest rank's share of an evaluation."""
WAIT_SECONDS = 0.2
"""Between two looks for the word of a rank that is waited for."""
BEAT_SECONDS = 5.0
"""Between two signs of life of a rank that works while others wait."""
CLOSE_SECONDS = 10.0
"""A process that leaves waits no longer than this for its workers, and as long for its group: a peer may be dead."""


_WAITS = itertools.count()  # the same on every rank, as each waits as often as the others


@dataclass(frozen=True, slots=True)
class World:
    """A process among the others."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the only one that writes shared files."""
        return self.rank == 0

    def groups_of(self, size: int) -> World:
        """This process as its group of `size` neighbours, which have the same micro-batches, among the groups."""
        return replace(self, rank=self.rank // size, size=self.size // size)


def start_world() -> World:
    """Join the process group that the launcher's environment describes (gloo on CPU, NCCL on GPUs), or one of one.

    The process leaves the group by itself when it ends (`leave_world`).
    """
    import deepspeed

    from calibtrain.build_locks import clear_abandoned_locks
    from calibtrain.shared_buffers import clear_abandoned_buffers

    # DeepSpeed 0.19 calls names that torch 2.13 deprecates, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    for line in clear_abandoned_locks():  # DeepSpeed builds next
        print(f"calibtrain: {line}", file=sys.stderr, flush=True)
    if device.type == "cpu" and local_rank == 0 and (freed := clear_abandoned_buffers()):
        print(
            f"calibtrain: removed {freed >> 20} MiB of shared memory that killed runs left", file=sys.stderr, flush=True
        )
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
        atexit.unregister(leave_world)
        atexit.register(leave_world)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave_world(seconds: float = CLOSE_SECONDS) -> None:
    """Let the group's workers finish and leave it, in bounded time. An exit handler; harmless when called again.

    A gloo worker drops the tensors of a collective after it has woken the thread that waits for it, and needs Python's
    lock to do so. On a busy machine it may get there when the interpreter is already shutting down: the lock then ends
    the thread inside a C++ destructor, which aborts a process whose work was done. Destroying the group does not wait for
    the workers as long as anything (DeepSpeed's engine and its gradient hooks) refers to the group.
    """
    if not _wait_for_workers(seconds):
        logger.warning("a collective has not ended within %g s; its process group is left as it is", seconds)
        return
    if dist.is_initialized():
        # In a thread of its own: NCCL waits for peers that may be gone.
        closing = threading.Thread(target=_destroy_groups, name="leave-world", daemon=True)
        closing.start()
        closing.join(seconds)
    _wait_for_workers(seconds)


def _destroy_groups() -> None:
    deepspeed = sys.modules.get("deepspeed")  # it keeps groups of its own, where it was used
    started = deepspeed is not None and deepspeed.comm.is_initialized()
    try:
        (deepspeed.comm if deepspeed is not None and started else dist).destroy_process_group()
    except Exception as error:  # a peer that died closes nothing in order
        logger.debug("the process group did not close in order: %s", error)


def _wait_for_workers(seconds: float) -> bool:
    """Until every gloo worker of this process sleeps, waiting for work. True when they do; elsewhere than on Linux, at once.

    The caller sleeps without Python's lock, so that a worker which sleeps throughout does not wait for the lock.
    """
    deadline = time.monotonic() + seconds
    asleep = 0
    while asleep < 3:
        states = [_state(task) for task in Path("/proc/self/task").glob("*") if _comm(task) == "pt_gloo_runloop"]
        asleep = asleep + 1 if all(state == "S" for state in states) else 0
        if not states:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _comm(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has just ended
        return ""


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "S"


def is_main_rank() -> bool:
    """Whether this process is global rank 0, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_agree(flag: bool, device: torch.device) -> bool:
    """True when `flag` holds on every rank. int32, because NCCL does not reduce booleans."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    tensor = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return bool(tensor.item())


def on_main(call: Callable[[], T]) -> T:
    """Call on rank 0 alone; every rank gets what it returns, or its UserError. Collective.

    For whatever each rank could see otherwise (a file, a cache, a clock) and a later collective depends on: were every rank
    to look for itself, some would enter it and wait for the others. The value is a small Python object.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return call()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = call()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]  # type: ignore[no-any-return]


def wait_for_main(call: Callable[[], None]) -> None:
    """`wait_for` rank 0: for long writing, since the other ranks of a collective give up after COLLECTIVE_TIMEOUT."""
    wait_for([0], call)


def wait_for(ranks: Sequence[int], call: Callable[[], None]) -> None:
    """Call on these ranks, however long it takes; all wait for their word, not by a clock. Collective.

    Where one fails, the others raise its UserError, an OSError for one of the file system's, or a RuntimeError. One that
    works shows that it lives: where nothing is heard of it for COLLECTIVE_TIMEOUT, they raise a RuntimeError. Where rank 0
    dies, its store is gone, and they fail.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return call()
    store, key, rank = dist.distributed_c10d._get_default_store(), f"calibtrain/waited/{next(_WAITS)}", dist.get_rank()
    failure: BaseException | None = None
    if rank in ranks:
        try:
            with _beating(store, f"{key}/{rank}/beats"):
                call()
        except BaseException as error:
            failure = error
        store.set(f"{key}/{rank}", "done" if failure is None else f"{_kind(failure)}\n{failure}")
    told = [_word_of(store, key, one) for one in ranks]
    barrier()  # rank 0 holds the store: it stays until all have read
    if failure is not None:
        raise failure
    for one, (kind, _, words) in zip(ranks, told, strict=True):
        if kind != "done":
            if kind == UserError.__name__:
                raise UserError(words)
            raise (OSError if kind == OSError.__name__ else RuntimeError)(f"rank {one} failed: {kind}: {words}")
    return None


def _kind(error: BaseException) -> str:
    """Name of an error's class; of one of the file system's that of them all."""
    return OSError.__name__ if isinstance(error, OSError) else type(error).__name__


@contextlib.contextmanager
def _beating(store: Any, key: str) -> Iterator[None]:
    """Count up in the store, every BEAT_SECONDS, while something is done."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            store.add(key, 1)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _word_of(store: Any, key: str, rank: int) -> tuple[str, str, str]:
    """What a rank said at its end. Raises RuntimeError where it is silent."""
    beats, heard = 0, time.monotonic()
    while not store.check([f"{key}/{rank}"]):
        time.sleep(WAIT_SECONDS)
        if (now := store.add(f"{key}/{rank}/beats", 0)) != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > COLLECTIVE_TIMEOUT.total_seconds():
            raise RuntimeError(
                f"nothing has been heard of rank {rank} for {COLLECTIVE_TIMEOUT}: it is dead, or cut off"
            )
    return store.get(f"{key}/{rank}").decode().partition("\n")  # type: ignore[no-any-return]


def check_alike(facts: Mapping[str, str], world: World) -> None:
    """Raise UserError, on every rank, unless `facts` (what it is -> its hash) are the same on all of them. Collective."""
    found = gather_lists([dict(facts)])
    for rank, own in enumerate(found):
        differing = [name for name in own if own[name] != found[0][name]]
        if differing:
            raise UserError(
                f"rank {rank} has another {' and another '.join(differing)} than rank 0: the files and the software of all "
                f"{world.size} processes must be the same"
            )


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Concatenate a tensor over ranks along its first dimension, whose length may differ. On CPU, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows.cpu()
    length = torch.tensor([rows.shape[0]], device=device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    counts = [int(one) for one in lengths]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=device)
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).cpu()


def gather_lists(values: list[T]) -> list[T]:
    """Concatenation of every rank's list of small Python objects, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def shard(items: Sequence[T], world: World) -> list[T]:
    """Contiguous share of `items` of this rank; shares differ by at most one item."""
    base, extra = divmod(len(items), world.size)
    start = world.rank * base + min(world.rank, extra)
    return list(items[start : start + base + (world.rank < extra)])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

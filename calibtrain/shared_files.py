"""Files that several processes share: which ranks see the same ones, and who writes.

Who shares a directory is found by files that each rank writes and the others look for, whatever the machines are called.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from calibtrain.distributed import World, barrier, gather_lists, on_main
from calibtrain.errors import UserError

logger = logging.getLogger(__name__)

LOOKS = 20
SECONDS_BETWEEN = 0.25
"""A network file system may show another machine's new file a few seconds late."""


def sharing(directory: Path, world: World) -> list[int]:
    """For each rank the lowest one whose files it sees in `directory`: 0 everywhere where all share it. Collective.

    Raises UserError, on every rank, where one cannot write there.
    """
    if world.size == 1:
        return [0]
    nonce = on_main(lambda: uuid.uuid4().hex)
    own = directory / f".calibtrain-{nonce}-{world.rank}"
    problem = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        problem = f"rank {world.rank} cannot write to {directory}: {error.strerror or error}"
    if told := [one for one in gather_lists([problem]) if one]:
        with contextlib.suppress(OSError):
            own.unlink()
        raise UserError(told[0])
    lowest = _lowest(directory, nonce)
    found = gather_lists([lowest])
    barrier()  # nobody is looking any more
    own.unlink(missing_ok=True)
    return found


def _lowest(directory: Path, nonce: str) -> int:
    """The lowest rank whose file is here, looked for a few times unless it is rank 0's."""
    found: list[int] = []
    prefix = f".calibtrain-{nonce}-"
    for look in range(LOOKS):
        # A network file system asks the server for a name, where it may list a directory as it was some seconds ago.
        if (directory / f"{prefix}0").exists():
            return 0
        found = [int(name.removeprefix(prefix)) for name in os.listdir(directory) if name.startswith(prefix)]
        if 0 in found or look == LOOKS - 1:
            break
        time.sleep(SECONDS_BETWEEN)
    return min(found)


def check_shared(directory: Path, key: str, world: World) -> None:
    """Raise UserError, on every rank, unless all ranks see what rank 0 writes into `directory`. Collective."""
    found = sharing(directory, world)
    apart = [str(rank) for rank, lowest in enumerate(found) if lowest]
    if apart:
        with contextlib.suppress(OSError):
            directory.rmdir()  # made here a moment ago, where it is empty
        some = ", ".join(apart[:8]) + (f" and {len(apart) - 8} more" if len(apart) > 8 else "")
        raise UserError(
            f"{key}: {directory} is not one directory for all processes: rank(s) {some} do not see the file that rank 0 "
            "wrote there; give a path on a disk that every machine mounts"
        )


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[bool]:
    """Processes that make the same `path` take turns, by a lock beside it that the system frees when its holder dies.

    Yields whether the lock is held: not where the file system knows none, as some shared ones; then several may come in.
    """
    import fcntl

    with path.with_name(f"{path.name}.lock").open("a") as lock:
        held = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s is being made by another process: waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held

"""Locks of torch's extension builds that a killed run left behind: whoever meets one waits for ever, without a line.

torch.utils.cpp_extension, by which DeepSpeed builds its ops, takes a lock by creating a file `lock` and keeps it open while
it builds. So a lock is held if a process has the file open. Only the processes of this machine can be looked at: what lies
on a file system that others share, or is another user's, is told and left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Holder = Literal["held", "nobody", "unknown"]

GRACE_SECONDS = 2.0
"""A lock so young may be about to be opened."""
SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "9p",
    "virtiofs",
    "fuse",
    "afs",
    "orangefs",
    "wekafs",
)
"""What the kinds of file systems begin with that several machines may write to."""


def extensions_root() -> Path:
    """Where torch builds extensions: $TORCH_EXTENSIONS_DIR, else its folder in the user's cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def build_locks(root: Path | None = None) -> list[Path]:
    """Locks that are there now."""
    root = extensions_root() if root is None else root
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def holder_of(lock: Path) -> Holder:
    """Whether a process holds the lock. One that is released meanwhile counts as held."""
    try:
        state = lock.stat()
        time.sleep(max(0.0, min(GRACE_SECONDS, state.st_mtime + GRACE_SECONDS - time.time())))
        known = _same_machine(lock) and (state.st_uid == os.getuid() or os.getuid() == 0)
        opened = _is_open(lock.stat())
    except FileNotFoundError:
        return "held"
    except OSError:
        return "unknown"
    return "held" if opened else "nobody" if known else "unknown"


def clear_abandoned_locks(root: Path | None = None) -> Iterator[str]:
    """Remove the locks that nobody holds; yields one line for each, and for each that may or may not be held.

    Processes take turns. While the file is there nobody else can take its lock, and who has it is seen.
    """
    import fcntl

    for lock in build_locks(root):
        if holder_of(lock) == "held":
            continue
        try:
            with open(lock.with_name(".calibtrain-clearing"), "w") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                holder = holder_of(lock)
                if holder == "nobody":
                    lock.unlink()
        except OSError:
            holder = "unknown"
        if holder == "nobody":
            yield f"removed {lock}, a build's lock that a killed run left behind"
        elif holder == "unknown":
            yield f"{lock} may be left of a killed run: if this waits for ever and nobody builds there, delete it"


def _is_open(wanted: os.stat_result) -> bool:
    """Whether a process of this machine has the file open, as far as its descriptors may be read."""
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            descriptors = list(process.iterdir())
        except OSError:  # another user's, or gone
            continue
        for descriptor in descriptors:
            try:
                found = descriptor.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _same_machine(path: Path) -> bool:
    """Whether the file system is this machine's own; false where that cannot be known."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    folder = path.resolve()
    under = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point.replace("\\040", " "))]
    return bool(under) and not max(under)[1].startswith(SHARED)

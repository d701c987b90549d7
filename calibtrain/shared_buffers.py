"""Shared memory of DeepSpeed's CPU collectives that killed runs left behind: 69 MB of RAM a rank, until the next boot.

A rank makes its buffer at the start, the others of its machine open it by name at once, and who ends in order removes it. A
buffer that has been there for longer than ranks wait for each other is opened by name no more: removed from under a run that
still maps it, it stays that run's until it ends.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
NAMES = "deepspeed_allreduce_buffer_*"
AGE_SECONDS = 1800.0
"""Three times as long as ranks wait for each other."""


def clear_abandoned_buffers(folder: Path = FOLDER) -> int:
    """Remove the user's own old buffers. Returns their bytes, which are free but for those that a run still maps."""
    freed = 0
    for path in folder.glob(NAMES):
        with contextlib.suppress(OSError):  # gone, or another's
            state = path.stat()
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > AGE_SECONDS:
                path.unlink()
                freed += state.st_blocks * 512
    return freed

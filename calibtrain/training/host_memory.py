"""Memory of ranks that train on CPU: what a step frees is kept for the next one, and given back now and then."""

from __future__ import annotations

import ctypes
import sys

RELEASE_EVERY = 10
"""Steps between two releases: rows of many lengths leave holes that no later row fills, about 5 MB a step."""


def release_freed_memory() -> None:
    """Give the pages of freed memory back to the system (glibc's malloc_trim); without glibc it does nothing."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

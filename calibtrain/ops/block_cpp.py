"""The elementwise work on one block of logits on CPUs: builds `token_stats.cpp` once and calls it through ctypes.

The library depends on a C++ compiler and the machine alone, not on PyTorch's headers: it builds in a few seconds. It is
kept under $CALIBTRAIN_CACHE, named by its source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from calibtrain.ops.head import Head

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("token_stats.cpp")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
BUILD_SECONDS = 120
"""How long a build may take, and how long a process waits for another one's."""


@cache
def load() -> ctypes.CDLL | None:
    """Return the compiled library, built where it is missing; None, logged once, where it cannot be had."""
    compiler = find_compiler()
    if compiler is None:
        reason = "there is no C++ compiler (c++, g++ or clang++ on PATH, or $CXX)"
    else:
        try:
            path = _cache_directory() / f"token_stats-{_key(compiler)}.so"
            if not path.exists():
                _build_once(compiler, path)
            return ctypes.CDLL(str(path))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed: {error.stderr.strip()[-400:]}"
        except (OSError, ImportError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    logger.warning("the fused ops run in plain PyTorch, which is slower: %s", reason)
    return None


def find_compiler() -> str | None:
    """Path of the C++ compiler: $CXX, c++, g++ or clang++, the first there is."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def update_stats(
    state: Tensor, top: Tensor, products: Tensor, start: int, targets: Tensor, bias: Tensor | None, head: Head
) -> None:
    """As `block_torch.update_stats`, for float32 and bfloat16 products; `bias` is float32."""
    _check((state, torch.float64), (top, torch.int64))
    _library().calibtrain_update_stats(
        *_block(products, start, targets, bias, head),
        ctypes.c_void_p(state.data_ptr()),
        ctypes.c_void_p(top.data_ptr()),
        torch.get_num_threads(),
    )


def form_gradient(
    products: Tensor, start: int, targets: Tensor, coefficients: Tensor, bias: Tensor | None, head: Head
) -> None:
    """As `block_torch.form_gradient`, for float32 and bfloat16 products; `bias` and `coefficients` are float32."""
    _check((coefficients, torch.float32))
    _library().calibtrain_form_gradient(
        *_block(products, start, targets, bias, head),
        ctypes.c_void_p(coefficients.data_ptr()),
        torch.get_num_threads(),
    )


def update_temperatures(
    state: Tensor,
    rest: Tensor,
    products: Tensor,
    start: int,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    inverse: Tensor,
) -> None:
    """As `block_torch.update_temperatures`, for float32 products; `bias` is float32."""
    assert products.dtype == torch.float32
    _check((state, torch.float64), (rest, torch.float64), (inverse, torch.float64))
    _library().calibtrain_update_temperatures(
        *_block(products, start, targets, bias, head)[1:],
        ctypes.c_void_p(inverse.data_ptr()),
        ctypes.c_int64(inverse.shape[0]),
        ctypes.c_void_p(state.data_ptr()),
        ctypes.c_void_p(rest.data_ptr()),
        torch.get_num_threads(),
    )


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None, "callers ask load() first"
    return library


def _block(products: Tensor, start: int, targets: Tensor, bias: Tensor | None, head: Head) -> tuple[object, ...]:
    _check((products, products.dtype), (targets, torch.int64), *(() if bias is None else ((bias, torch.float32),)))
    return (
        int(products.dtype == torch.bfloat16),
        ctypes.c_void_p(products.data_ptr()),
        ctypes.c_int64(products.shape[0]),
        ctypes.c_int64(products.shape[1]),
        ctypes.c_int64(start),
        ctypes.c_void_p(targets.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_float(head.logit_scale),
        ctypes.c_float(head.softcap or 0.0),
    )


def _check(*tensors: tuple[Tensor, torch.dtype]) -> None:
    """The library gets addresses alone: what it takes for granted of a tensor is held against it here."""
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor, dtype in tensors)


def _cache_directory() -> Path:
    directory = Path(os.environ.get("CALIBTRAIN_CACHE", Path.home() / ".cache" / "calibtrain")) / "kernels"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _key(compiler: str) -> str:
    """What the library depends on: its source, the flags, the compiler and the processor that `native` stands for."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    parts = [SOURCE.read_text(), *FLAGS, version, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build_once(compiler: str, path: Path) -> None:
    """Build `path`, one process of a machine at a time.

    The lock belongs to an open file, so it goes with a holder that dies; who has waited too long, or cannot lock, builds
    a copy of its own. A library appears whole, by renaming it.
    """
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        deadline = time.monotonic() + BUILD_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        if not path.exists():
            _build(compiler, path)


def _build(compiler: str, path: Path) -> None:
    print(f"calibtrain: building the CPU kernel with {compiler}, once, into {path.parent}", file=sys.stderr, flush=True)
    started = time.monotonic()
    native = "-mcpu=native" if platform.machine() in ("aarch64", "ppc64le") else "-march=native"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, native, "-fopenmp", str(SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        built.replace(path)
    logger.info("built %s in %.1f s", path, time.monotonic() - started)

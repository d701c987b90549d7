"""A real vLLM server on loopback for tests marked `engine`: what is certified by it is what others would be served."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[1] / ".venv-engines" / "bin" / "python"
needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-engines; run `make engines`")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
}


@contextmanager
def vllm_server(
    directory: str | Path,
    *,
    dtype: str = "float32",
    name: str = "served",
    max_model_len: int = 256,
    arguments: tuple[str, ...] = (),
    timeout: float = 240.0,
) -> Iterator[str]:
    """Base URL ("http://127.0.0.1:PORT/v1") of a `vllm serve` of a Hugging Face directory, under the model id `name`.

    dtype: float32, bfloat16 or auto. arguments: more of `vllm serve`. It takes about 40 s to start,
    and its first request some 20 s more; `timeout` is for the start. The whole process group ends with the block.
    RuntimeError with the end of its log where it does not come up. Mark tests `engine` and `needs_vllm`: the server runs in
    .venv-engines, which `make engines` makes. (The `vllm` command itself fails where the package is called vllm-cpu.)

    What vLLM needs on a CPU (ENVIRONMENT): VLLM_CPU_KVCACHE_SPACE, GiB of its key-value cache, else it takes half the
    memory; VLLM_CPU_OMP_THREADS_BIND=nobind, else its threads are pinned to cores that others use too; OMP_NUM_THREADS;
    VLLM_NO_USAGE_STATS, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, so that it asks no network for anything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", "16", "--enforce-eager",
        "--served-model-name", name, *arguments,
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", timeout, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _end_with_parent() -> None:
    """SIGTERM where the test's process is killed and cannot clean up (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(process: subprocess.Popen, url: str, timeout: float, log) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    why = "ended" if process.poll() is not None else f"did not answer within {timeout:g} s"
    log.seek(0)
    raise RuntimeError(f"vllm serve {why}:\n{log.read().decode(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    """The server and the engine processes that it started."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()

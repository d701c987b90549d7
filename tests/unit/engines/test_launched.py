"""A server that a run has started ends with it, however the run ends, and takes nobody else along."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibtrain.engines import LaunchedServer
from calibtrain.errors import UserError

ROOT = Path(__file__).parents[3]
SERVER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[sys.argv.index("--model") + 1], "w").write(f"{child.pid} {' '.join(sys.argv[1:])}")
print("serving", flush=True)
time.sleep(60)
"""
PARENT = """
import sys, time
from pathlib import Path
from calibtrain.engines import LaunchedServer
LaunchedServer(Path(sys.argv[1]), Path(sys.argv[2]), dtype="float32").start()
time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A vLLM that starts a process of its own and waits."""
    folder = tmp_path / "stub" / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for one in (folder, folder.parent, folder.parents[1]):
        (one / "__init__.py").write_text("")
    (folder / "api_server.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stub'}:{ROOT}")
    return folder / "api_server.py"


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(path):
    until(lambda: path.exists() and path.read_text())
    child, *words = path.read_text().split()
    return int(child), words


def test_it_is_started_on_loopback_and_ends_with_what_it_started(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    server = LaunchedServer(tmp_path / "model", tmp_path / "log", dtype="bfloat16", arguments=("--seed", "7"))
    assert not server.alive
    server.start()
    child, words = told(tmp_path / "model")
    assert server.alive
    pairs = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    assert pairs["--host"] == "127.0.0.1"
    assert (pairs["--dtype"], pairs["--seed"]) == ("bfloat16", "7")
    assert server.url == f"http://127.0.0.1:{pairs['--port']}/v1"
    environment = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
    assert b"VLLM_SERVER_DEV_MODE=1" in environment
    assert b"RANK=3" not in environment
    until(lambda: "serving" in server.last_words())
    pid = server.process.pid
    server.end()
    until(lambda: gone(child))
    assert gone(pid)
    assert not server.alive
    server.end()


def test_one_that_died_leaves_nobody_when_it_is_ended(stub, tmp_path):
    server = LaunchedServer(tmp_path / "model", tmp_path / "log", dtype="float32")
    server.start()
    child, _ = told(tmp_path / "model")
    os.kill(server.process.pid, signal.SIGKILL)
    until(lambda: not server.alive)
    server.start()  # anew
    until(lambda: gone(child))
    assert server.alive
    server.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_does_not_outlive_who_started_it(stub, tmp_path, number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path / "model", tmp_path / "log"])
    child, _ = told(tmp_path / "model")
    server = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    parent.send_signal(number)
    parent.wait()
    until(lambda: gone(server))
    os.kill(child, signal.SIGKILL)  # the stub does not end it; vLLM does


def test_what_is_no_interpreter_or_has_no_vllm_is_told(tmp_path):
    with pytest.raises(UserError, match="no-such-python is no interpreter; install vLLM there"):
        LaunchedServer(tmp_path, tmp_path / "log", dtype="float32", python=Path("no-such-python"))
    with pytest.raises(UserError, match=r"has no vLLM; install vLLM there \(pip install vllm;.*rollouts.engine.python"):
        LaunchedServer(tmp_path, tmp_path / "log", dtype="float32")
    with pytest.raises(UserError, match=r"rollouts.engine.host: 203\.0\.113\.1 is no address of this machine"):
        LaunchedServer(tmp_path, tmp_path / "log", dtype="float32", python=_any(tmp_path), host="203.0.113.1")


def _any(folder):
    """Something that runs, and does not say that it has no vLLM."""
    path = folder / "python"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return path

"""Work on untrusted text that may take for ever: it is done in a process beside, which is ended when its time is over.

A signal, as math-verify's own time limit sets, works in a main thread alone, and neither it nor a thread can interrupt `re`
or the power of two large integers.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from calibtrain.errors import UserError

STARTING = 120.0
"""Seconds that the process has to start and to import what it needs."""


class Overdue(Exception):
    """The work took longer than it may, or more memory."""


class Worker:
    """A process that runs `calibtrain.tasks.<module>`, which maps a JSON value a line to a JSON value a line.

    Its first line says that it is ready. Threads may share it; it is started when it is first
    asked, again after it was ended, and once in each process.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._owner = 0
        atexit.register(self.close)

    def ask(self, value: Any, seconds: float) -> Any:
        """What the process makes of `value`. Raises Overdue, and UserError where it cannot work at all."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([seconds, value]) + "\n")
                process.stdin.flush()
                return json.loads(self._lines.get(timeout=seconds))
            except (Empty, OSError, ValueError) as error:  # too slow, or ended by itself: out of memory
                self._end()
                raise Overdue from error

    def close(self) -> None:
        """End the process; it starts again when it is asked."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._lines = SimpleQueue()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", f"calibtrain.tasks.{self.module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        self._owner = os.getpid()
        said: deque[str] = deque(maxlen=2)
        threading.Thread(target=_pass_on, args=(process.stdout, self._lines.put), daemon=True).start()
        errors = threading.Thread(target=_pass_on, args=(process.stderr, said.append), daemon=True)
        errors.start()
        try:
            json.loads(self._lines.get(timeout=STARTING))
        except (Empty, ValueError) as error:
            self._end()
            errors.join(1.0)
            last = next(filter(None, reversed(said)), f"silent for {STARTING:.0f} s").strip()
            raise UserError(f"the process that compares answers did not start: {last}") from error
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()


def _pass_on(stream: Any, take: Callable[[str], None]) -> None:
    """Lines of a stream until it ends; an empty one then."""
    with stream:
        for line in stream:
            take(line)
    take("")


def serve(work: Callable[[Any], Any], memory: int | None = None) -> None:
    """The process's side: answers with work(value) until its input ends. `memory`: bytes it may use, where that can be set.

    What `work` raises is answered with null. Work whose asker was killed ends by itself.
    """
    alarm: Callable[[int], Any] = getattr(signal, "alarm", lambda seconds: None)
    if memory is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    out = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        seconds, value = json.loads(line)
        alarm(int(seconds) + 2)
        try:
            found = work(value)
        except Exception:  # of a parser on a stranger's text
            found = None
        alarm(0)
        print(json.dumps(found), file=out, flush=True)

"""SIGTERM asks a run to stop: it ends after the step, on all ranks at once, with a checkpoint to go on from.

Schedulers send it before they take a machine away: Slurm's --signal and preemption, Kubernetes, spot instances, and whoever
ends the launcher. A second one changes nothing; SIGKILL still ends a run at once, and costs the steps since its last
checkpoint.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from calibtrain.distributed import World

logger = logging.getLogger(__name__)

_asked_here = threading.Event()


def stop_was_asked() -> bool:
    """Whether this very process was asked to stop, for whoever waits long within a step."""
    return _asked_here.is_set()


class StopRequests:
    """While it is entered, SIGTERM is a request to this rank. A request to any rank stops all of them after one same step.

    The ranks' requests are summed beside the step (4 bytes) and read when it has ended, so that nobody waits for the sum.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = False
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._sum: Any = None
        self._before: Any = None

    def __enter__(self) -> StopRequests:
        _asked_here.clear()
        if threading.current_thread() is threading.main_thread():  # Python lets no other one handle signals
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def begin(self) -> None:
        """Start to sum the requests so far. Collective."""
        self._flag = torch.tensor([int(self.asked)], dtype=torch.int32, device=self.world.device)
        if self.world.size > 1:
            self._sum = dist.all_reduce(self._flag, async_op=True)

    def made(self) -> bool:
        """Whether any rank was asked to stop before the last `begin`; the same on every rank."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None
        return bool(self._flag.item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        _asked_here.set()

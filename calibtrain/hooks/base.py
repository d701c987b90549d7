"""The hook API: what a hook may implement, and the list that calls hooks, merges their sums, survives their errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.hooks.records import (
    CheckpointRecord,
    EndRecord,
    EvaluationRecord,
    LogRecord,
    MicroBatchRecord,
    RunRecord,
    SpectraRecord,
    StepRecord,
)

logger = logging.getLogger(__name__)

EVENTS: Mapping[str, type] = {
    "on_start": RunRecord,
    "on_micro_batch": MicroBatchRecord,
    "on_step": StepRecord,
    "on_log": LogRecord,
    "on_evaluation": EvaluationRecord,
    "on_spectra": SpectraRecord,
    "on_checkpoint": CheckpointRecord,
    "on_end": EndRecord,
}
"""Every event there is, with the record it carries."""


CARRIED = ""
"""Among the states of hooks, whose names are not empty."""


class Hook:
    """Observes training and never changes it. Override what you need; every method here does nothing.

    A hook that returns sums must be in the list of every rank, and `sums()` must have the same keys and shapes on all
    of them from construction on. No collectives inside a hook: the list makes the only one.
    """

    name: str = ""

    def on_start(self, record: RunRecord) -> None:
        """Once, before the first step."""

    def on_micro_batch(self, record: MicroBatchRecord) -> None:
        """After each forward pass of this rank; must not wait for the device."""

    def on_step(self, record: StepRecord) -> None:
        """After each optimiser step."""

    def sums(self) -> dict[str, Tensor]:
        """Statistics since the last `reset`: additive tensors of fixed shape, at most float64."""
        return {}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from the sums of all ranks (float64, on the CPU); a pure function, so every rank gets the same."""
        return {}

    def reset(self) -> None:
        """Set the sums to zero."""

    def on_log(self, record: LogRecord) -> None:
        """After each log interval, with the merged metrics."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """After each evaluation."""

    def on_spectra(self, record: SpectraRecord) -> None:
        """After matrices were read against where the run began."""

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        """After a checkpoint is complete on disk."""

    def on_end(self, record: EndRecord) -> None:
        """Once, also when training failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and JSON values only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; called before `on_start`."""


class HookList:
    """Calls hooks in their order. A hook that raises is reported once and disabled on this rank; training goes on.

    The layout of the merged vector is fixed at construction from each hook's sums, in sorted order; a disabled hook
    contributes zeros, so that the ranks always agree on it.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        """Take hooks with distinct names. Raises UserError for a method on_* that is no event, or a name used twice."""
        self.hooks = {hook.name: hook for hook in hooks}
        if len(self.hooks) != len(hooks) or "" in self.hooks:
            raise UserError(f"hooks need distinct, non-empty names, got {[hook.name for hook in hooks]}")
        for hook in hooks:
            _check_events(hook)
        self.disabled: set[str] = set()
        self._lost: set[str] = set()  # hooks already reported as missing on some rank
        self._layout = [
            (name, key, tensor.shape)
            for name, hook in sorted(self.hooks.items())
            for key, tensor in sorted(hook.sums().items())
        ]
        self._summing = sorted({name for name, _, _ in self._layout})
        self._carried: Tensor | None = None  # sums of ranks that are no more, until the next log

    def dispatch(self, event: str, record: Any) -> None:
        """Tell every enabled hook. Raises UserError for an event that does not exist or a record of another event."""
        if event not in EVENTS:
            raise UserError(f"hooks know no event {event!r}{_nearest(event)}; events are {', '.join(EVENTS)}")
        if not isinstance(record, EVENTS[event]):
            raise UserError(f"{event} takes a {EVENTS[event].__name__}, got a {type(record).__name__}")
        if isinstance(record, RunRecord):
            self._check_layout(record.rank)
        for name, hook in self.hooks.items():
            if name not in self.disabled:
                self._guard(name, event, getattr(hook, event), record)

    def reduce_and_log(self, step: int, total_steps: int) -> dict[str, float]:
        """Merge all hooks' sums with one all-reduce, compute the metrics, tell `on_log`; the same dict everywhere."""
        merged = self._merged_sums()
        metrics: dict[str, float] = {}
        for name in self._summing:
            # Also where the hook is disabled: the other ranks' numbers must come out the same everywhere.
            computed = self._guard(name, "compute", self.hooks[name].compute, merged[name])
            metrics.update({key: float(value) for key, value in sorted((computed or {}).items())})
            self._guard(name, "reset", self.hooks[name].reset)
        self.dispatch("on_log", LogRecord(step=step, total_steps=total_steps, metrics=metrics))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """State of every hook of this rank by name, of tensors and JSON values only."""
        states = {}
        for name, hook in self.hooks.items():
            if (state := self._guard(name, "state_dict", _plain_state, hook)) is not None:
                states[name] = state
        return states if self._carried is None else {**states, CARRIED: self._carried}

    def load_state_dict(
        self, states: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = (), *, begins: bool = False
    ) -> None:
        """Restore hooks by name; a hook that the checkpoint does not know starts afresh, with a warning.

        `others` are the states of ranks that are no more: their sums are part of the next log. `begins`: the states are
        another rank's, and this one, which is new, has no sums yet.
        """
        carried = []
        for other in others:
            self._load(other)
            carried.append(self._flat_sums(torch.device("cpu")))
        self._load(states)
        if begins:
            for name in self._summing:
                self._guard(name, "reset", self.hooks[name].reset)
        kept = [one[CARRIED] for one in ([] if begins else [states, *others]) if CARRIED in one]
        kept = [one for one in [*carried, *kept] if one.shape == self._flat_sums(torch.device("cpu")).shape]
        self._carried = torch.stack(kept).sum(dim=0) if kept else None
        for name in [] if begins else sorted(self.hooks.keys() - states.keys()):
            logger.warning("hook %s has no state in this checkpoint and starts afresh", name)

    def _load(self, states: Mapping[str, Any]) -> None:
        for name, hook in self.hooks.items():
            if name in states:
                self._guard(name, "load_state_dict", hook.load_state_dict, states[name])

    def _flat_sums(self, device: torch.device) -> Tensor:
        """Every hook's sums, one behind the other, float64."""
        own = {name: self._own_sums(name) for name in self._summing}
        parts = [own[name][key].to(device, torch.float64).reshape(-1) for name, key, _ in self._layout]
        return torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *parts])

    def _merged_sums(self) -> dict[str, dict[str, Tensor]]:
        device = _reduction_device()
        sums = self._flat_sums(device)
        if self._carried is not None:
            sums, self._carried = sums + self._carried.to(device), None
        running = torch.tensor([float(name not in self.disabled) for name in self._summing], dtype=torch.float64)
        vector = torch.cat([sums, running.to(device)])
        world_size = 1
        if dist.is_available() and dist.is_initialized():
            world_size = dist.get_world_size()
            dist.all_reduce(vector)
        values = vector.cpu()
        merged: dict[str, dict[str, Tensor]] = {name: {} for name in self._summing}
        offset = 0
        for name, key, shape in self._layout:
            merged[name][key] = values[offset : offset + shape.numel()].reshape(shape)
            offset += shape.numel()
        for name, ranks in zip(self._summing, values[offset:].tolist(), strict=True):
            if ranks < world_size and name not in self._lost and name not in self.disabled:
                logger.warning("hook %s runs on %d of %d ranks: its numbers are theirs", name, int(ranks), world_size)
                self._lost.add(name)
        return merged

    def _own_sums(self, name: str) -> dict[str, Tensor]:
        shapes = {key: shape for hook, key, shape in self._layout if hook == name}
        if name not in self.disabled:
            sums = self._guard(name, "sums", _checked_sums, self.hooks[name], shapes)
            if sums is not None:
                return sums
        return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}

    def _guard(self, name: str, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception:
            if name not in self.disabled:
                self.disabled.add(name)
                logger.warning(
                    "hook %s failed in %s and is disabled on this rank; training goes on\n%s",
                    name,
                    what,
                    traceback.format_exc(),
                )
            return None

    def _check_layout(self, rank: int) -> None:
        """Ranks that would add different numbers must not begin: one small collective compares hashes of layouts."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        text = json.dumps([(name, key, list(shape)) for name, key, shape in self._layout])
        code = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        codes = torch.tensor([code, -code], dtype=torch.int64, device=_reduction_device())
        dist.all_reduce(codes, op=dist.ReduceOp.MAX)
        if codes[0].item() != -codes[1].item():
            raise UserError(
                f"hooks with sums differ between ranks; rank {rank} has {self._summing or 'none'}: "
                "construct every hook that returns sums on every rank"
            )


def _check_events(hook: Hook) -> None:
    for attribute in dir(hook):
        if attribute.startswith("on_") and attribute not in EVENTS:
            raise UserError(f"hook {hook.name}: {attribute} is no event{_nearest(attribute)}; it would never be called")


def _nearest(event: str) -> str:
    near = difflib.get_close_matches(event, EVENTS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _reduction_device() -> torch.device:
    # NCCL reduces CUDA tensors only; gloo and a single process are served by the CPU.
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _checked_sums(hook: Hook, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    sums = hook.sums()
    found = {key: tensor.shape for key, tensor in sums.items()}
    if found != dict(shapes):
        raise ValueError(f"sums() changed its layout from {dict(shapes)} to {found}")
    return sums


def _plain_state(hook: Hook) -> dict[str, Any]:
    state = hook.state_dict()
    json.dumps(state, default=_only_tensors)  # raises for what could only be pickled
    return state


def _only_tensors(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor"
    raise TypeError(f"state_dict() holds a {type(value).__name__}; tensors and JSON values only")

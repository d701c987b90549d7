"""The optimisation itself: loss terms, learning rate, gradient norm, throughput."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calibtrain.hooks.base import Hook
from calibtrain.hooks.records import MicroBatchRecord, RunRecord, StepRecord

STEP_FIELDS = {
    "learning_rate": "train/lr",
    "epoch": "train/epoch",
    "grad_norm": "train/grad_norm",
    "logit_scale": "train/logit_scale",
}
"""Fields of a StepRecord that are logged as they were at the last step, and their keys."""


class TrainingHook(Hook):
    """`train/loss/<term>` (mean over all ranks' items), `train/lr`, `train/grad_norm`, `train/tokens_per_second`, ...

    `terms` are the names of all loss terms of the run, in any order, and `measures` of what its losses tell beside them
    (`train/policy/<measure>`, a mean as well); they fix the layout of the sums.
    """

    name = "training"

    def __init__(self, terms: Sequence[str], measures: Sequence[str] = ()) -> None:
        self._terms = sorted(terms)
        self._measures = sorted(measures)
        self._loss: Tensor = torch.zeros(len(self._terms), 2, dtype=torch.float64)  # sum, count
        self._measured: Tensor = torch.zeros(len(self._measures), 2, dtype=torch.float64)
        self._steps: Tensor = torch.zeros(4, dtype=torch.float64)  # tokens, seconds, steps, skipped; of this rank
        # Of this rank: FLOPs, seconds for data, seconds of waiting, steps that know these, bytes on the device.
        self._cost: Tensor = torch.zeros(5, dtype=torch.float64)
        self._peak: float | None = None
        self._last: dict[str, float] = {}
        self._rounds: dict[str, list[float]] = {}  # of each number of a round its sum and count over steps
        self._world_size = 1

    def on_start(self, record: RunRecord) -> None:
        """Remember how many ranks share the work."""
        self._world_size = record.world_size

    def on_micro_batch(self, record: MicroBatchRecord) -> None:
        """Add the terms' sums and counts, without waiting for the device."""
        if unknown := set(record.term_sums) - set(self._terms):
            raise ValueError(f"loss terms {sorted(unknown)} were not announced; announced are {self._terms}")
        zero = record.logprob.new_zeros((), dtype=torch.float64)
        rows = [
            torch.stack([terms.get(name, zero).detach().to(zero) for terms in (record.term_sums, record.term_counts)])
            for name in self._terms
        ]
        self._loss = self._loss.to(zero.device) + torch.stack(rows) if rows else self._loss
        if self._measures:
            told = [torch.stack([one.total.to(zero), one.count.to(zero)]) for _, one in sorted(record.measures.items())]
            self._measured = self._measured.to(zero.device) + torch.stack(told)

    def on_step(self, record: StepRecord) -> None:
        """Remember the schedule's values and add up time and tokens."""
        self._steps += torch.tensor([record.tokens, record.seconds, 1, record.skipped], dtype=torch.float64)
        cost = record.cost
        waited, told = cost.waiting_seconds or 0.0, cost.waiting_seconds is not None
        self._cost += torch.tensor([cost.flops, cost.data_seconds, waited, told, 0], dtype=torch.float64)
        self._cost[4], self._peak = cost.device_bytes or 0, cost.peak
        values = {key: getattr(record, field) for field, key in STEP_FIELDS.items()}
        values |= {f"train/weight_penalty/{name}": value for name, value in record.weight_penalties.items()}
        self._last = {key: float(value) for key, value in values.items() if value is not None}
        for name, value in record.rollouts.items():  # the same on every rank
            if not math.isnan(value):
                total = self._rounds.setdefault(name, [0.0, 0.0])
                total[0] += float(value)
                total[1] += 1.0

    def sums(self) -> dict[str, Tensor]:
        """`loss` (terms, 2), `measured` (measures, 2), `steps` (4,) and `cost` (5,)."""
        return {"loss": self._loss, "measured": self._measured, "steps": self._steps, "cost": self._cost}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over items; a term without items in the interval has no key."""
        metrics = dict(self._last)
        metrics |= {f"train/rollouts/{name}": total / count for name, (total, count) in self._rounds.items()}
        for kind, names, found in (("loss", self._terms, "loss"), ("policy", self._measures, "measured")):
            for name, (total, count) in zip(names, sums[found].tolist(), strict=True):
                if count > 0:
                    metrics[f"train/{kind}/{name}"] = total / count
        tokens, seconds, steps, skipped = sums["steps"].tolist()
        if steps > 0:
            metrics["train/skipped_share"] = skipped / steps
            metrics["train/seconds_per_step"] = seconds / steps
        if seconds > 0:  # the ranks work at the same time
            metrics["train/tokens_per_second"] = tokens / (seconds / self._world_size)
            metrics |= self._throughput(sums["cost"].tolist(), seconds, steps)
        return metrics

    def _throughput(self, cost: Sequence[float], seconds: float, steps: float) -> dict[str, float]:
        """Means over ranks; device memory, too, as sums are all that ranks exchange."""
        flops, data, waiting, told, held = cost
        metrics = {"train/seconds_for_data": data / steps}
        if told > 0:
            metrics["train/seconds_waiting"] = waiting / told
        if flops > 0:
            metrics["train/tflops_per_second_and_device"] = flops / seconds / 1e12
            if self._peak:
                metrics["train/mfu"] = flops / seconds / self._peak
        if held > 0:
            metrics["train/device_gib"] = held / self._world_size / 2**30
        return metrics

    def reset(self) -> None:
        """Zero the sums; the schedule's values stay."""
        self._loss = torch.zeros_like(self._loss)
        self._measured = torch.zeros_like(self._measured)
        self._steps = torch.zeros_like(self._steps)
        self._cost = torch.zeros_like(self._cost)
        self._rounds = {}

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last log, so that the first log after a resume is the one of an unbroken run."""
        return {
            "terms": self._terms,
            "loss": self._loss.cpu(),
            "measured": self._measured.cpu(),
            "steps": self._steps,
            "cost": self._cost,
            "last": self._last,
            "rounds": self._rounds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; the loss terms must be those of the checkpoint."""
        if list(state["terms"]) != self._terms:
            raise ValueError(f"the checkpoint has loss terms {state['terms']}, this run has {self._terms}")
        self._loss, self._steps = state["loss"].clone(), state["steps"].clone()
        if "measured" in state:  # earlier versions measured nothing
            self._measured = state["measured"].clone()
        if "cost" in state:
            self._cost = state["cost"].clone()
        self._last = dict(state["last"])
        self._rounds = {name: list(total) for name, total in state.get("rounds", {}).items()}

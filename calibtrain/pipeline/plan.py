"""`calibtrain plan`: what a run needs on GPUs that are not here, and which settings fit them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.pipeline.plan_memory import (
    DEVICE,
    HOST,
    Activations,
    Held,
    ModelSize,
    activations,
    model_size,
    phases,
    total,
)
from calibtrain.pipeline.plan_time import BYTES, PRODUCTS, Cluster, StepTime, step_time
from calibtrain.training.deepspeed_config import BatchPlan, batch_plan

ROOM = 0.92
"""Share of a GPU's memory that may be planned: the allocator's holes take the rest."""
ON_ALL_RANKS = ("loading", "training", "answering while training")


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to set a run up, what each of its phases holds, and how long a step takes."""

    config: RunConfig
    plan: BatchPlan
    phases: dict[str, Held]
    time: StepTime

    @property
    def device_bytes(self) -> int:
        """Of a rank, at its fullest while it loads, trains and answers."""
        return max(total(self.phases[name], DEVICE) for name in ON_ALL_RANKS)

    @property
    def host_bytes(self) -> int:
        """Of a rank, in the same phases."""
        return max(total(self.phases[name], HOST) for name in ON_ALL_RANKS)

    def fits(self, cluster: Cluster, host_gib: float | None) -> bool:
        """Whether every rank has room."""
        fits_host = host_gib is None or self.host_bytes * cluster.gpus <= host_gib * 2**30
        return self.device_bytes <= cluster.gib * 2**30 * ROOM and fits_host

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that were chosen."""
        training = self.config.training
        return {
            "training.zero_stage": training.zero_stage,
            "training.micro_batch_size": training.micro_batch_size,
            "training.offload_optimizer": training.offload_optimizer,
            "training.offload_parameters": training.offload_parameters,
            "model.gradient_checkpointing": self.config.model.gradient_checkpointing,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on a cluster: as its config says, and the fastest way that fits, if there is one."""

    cluster: Cluster
    size: ModelSize
    activations: Activations
    as_configured: Choice | None
    why_not: str  # why it cannot run as configured
    best: Choice | None
    best_by_stage: dict[int, Choice]
    host_gib: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values: bytes and seconds."""
        return {
            "gpus": self.cluster.world,
            "parameters": self.size.parameters,
            "trainable": self.size.trainable,
            "assumed": {"share_of_peak": PRODUCTS, "share_of_bandwidth": BYTES, "share_of_memory": ROOM},
            "as_configured": self._told(self.as_configured),
            "why_not_as_configured": self.why_not or None,
            "best": self._told(self.best),
            "best_by_stage": {str(stage): self._told(choice) for stage, choice in self.best_by_stage.items()},
        }

    def _told(self, choice: Choice | None) -> dict[str, Any] | None:
        if choice is None:
            return None
        time = choice.time
        return {
            "settings": choice.settings,
            "fits": choice.fits(self.cluster, self.host_gib),
            "device_bytes": choice.device_bytes,
            "host_bytes": choice.host_bytes,
            "phases": {
                name: {what: {"bytes": count, "where": where} for what, (count, where) in held.items()}
                for name, held in choice.phases.items()
            },
            "step": {
                "seconds": [time.shortest, time.longest],
                "products": time.products,
                "communication": time.communication,
                "optimizer": time.optimizer,
                "tokens": time.tokens,
                "tokens_per_second": [time.tokens / time.longest, time.tokens / time.shortest],
            },
        }


def make_plan(config: RunConfig, cluster: Cluster, host_gib: float | None = None) -> Plan:
    """Plan a run. Raises UserError where the model's config.json is not at hand or the architecture cannot be counted."""
    if config.model.dtype == "auto":  # of the GPUs, whatever this machine has
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    size, length = model_size(config), config.packing_tokens or config.data.max_length
    saved = activations(config, length)

    def choice(one: RunConfig) -> Choice:
        plan = batch_plan(one.training, cluster.world)
        return Choice(one, plan, phases(one, size, plan, saved), step_time(one, size, plan, cluster, length))

    why_not, own = "", None
    try:
        own = choice(config)
    except UserError as error:
        why_not = str(error)
    found = [one for one in map(choice, ways(config, cluster.world)) if one.fits(cluster, host_gib)]
    found.sort(key=lambda one: (one.time.longest, one.device_bytes))
    by_stage: dict[int, Choice] = {}
    for one in found:
        by_stage.setdefault(one.config.training.zero_stage, one)
    best = found[0] if found else None
    return Plan(cluster, size, saved, own, why_not, best, dict(sorted(by_stage.items())), host_gib)


def ways(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """The config with every stage, micro-batch, offload and checkpointing that it may have on so many ranks."""
    training = config.training
    groups = world // training.sequence_parallel_size
    if world % training.sequence_parallel_size or training.global_batch_size % groups:
        return
    per_rank = training.global_batch_size // groups
    sizes = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    stages, offloads = [1, 2, 3], [(False, False), (True, False), (True, True)]
    if training.deepspeed is not None:  # a JSON of one's own says both
        stages, offloads = [training.zero_stage], [(training.offload_optimizer, training.offload_parameters)]
    if config.model.compile or (config.model.lora is not None and config.model.lora.dora):
        stages = [stage for stage in stages if stage < 3]
    for stage, size, (optimizer, parameters), again in itertools.product(stages, sizes, offloads, (False, True)):
        if parameters and stage < 3:
            continue
        changes = {
            "zero_stage": stage,
            "micro_batch_size": size,
            "offload_optimizer": optimizer,
            "offload_parameters": parameters,
        }
        yield config.model_copy(
            update={
                "training": training.model_copy(update=changes),
                "model": config.model.model_copy(update={"gradient_checkpointing": again}),
            }
        )


def show(plan: Plan) -> None:
    """Print it for people."""
    from rich.console import Console
    from rich.table import Table

    console, cluster, size = Console(soft_wrap=True, highlight=False, markup=False), plan.cluster, plan.size
    console.print(
        f"{size.parameters:,} parameters, {size.trainable:,} trained, on {cluster.nodes} x {cluster.gpus} GPUs of "
        f"{cluster.gib:g} GiB"
    )
    for title, choice in (("as configured", plan.as_configured), ("the fastest that fits", plan.best)):
        if choice is None:
            console.rule(title)
            console.print(plan.why_not if title == "as configured" else _nothing_fits(plan))
            continue
        console.rule(title)
        console.print(" ".join(f"{key}={_yaml(value)}" for key, value in choice.settings.items()))
        table = Table("phase", "GiB on each GPU", "GiB of host memory for each", "the most of it")
        for name, held in choice.phases.items():
            most = sorted(held.items(), key=lambda item: -item[1][0])[:3]
            told = ", ".join(f"{what} {count / 2**30:.1f}" for what, (count, _) in most)
            table.add_row(name, f"{total(held, DEVICE) / 2**30:.1f}", f"{total(held, HOST) / 2**30:.1f}", told)
        console.print(table)
        fits = "fits" if choice.fits(cluster, plan.host_gib) else f"does not fit into {ROOM:.0%} of {cluster.gib:g} GiB"
        time = choice.time
        console.print(
            f"{fits}; a step of {choice.plan.global_batch_size} records, {time.tokens:,} tokens at most: "
            f"{time.shortest:.2f} to {time.longest:.2f} s (products {time.products:.2f}, communication "
            f"{time.communication:.2f}, optimizer {time.optimizer:.2f})"
        )
        if (alone := total(choice.phases["evaluating"], DEVICE)) > cluster.gib * 2**30 * ROOM:
            console.print(
                f"after training it cannot be asked on these GPUs ({alone / 2**30:.0f} GiB each): ask a server (--engine)"
            )
        elif choice.config.training.zero_stage == 3:
            console.print(
                "after training: evaluate and calibrate with --num-processes, so that none holds the model whole"
            )
    console.print(
        f"Assumed: products at {PRODUCTS:.0%} of the peak, links at {BYTES:.0%} of theirs, every row full. docs/scale.md "
        "has the model and its errors."
    )


def _nothing_fits(plan: Plan) -> str:
    if plan.why_not:
        return "nothing was tried: the batch cannot be cut up"
    ways_out = "more GPUs, a shorter data.max_length, a smaller evaluation.batch_size, model.lora or its load_in_4bit"
    return f"nothing fits: take {ways_out}"


def _yaml(value: object) -> str:
    return json.dumps(value)

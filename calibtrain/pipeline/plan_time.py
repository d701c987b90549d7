"""How long an optimiser step takes, by a stated model: products, bytes of the optimizer and bytes between ranks.

Assumed: products run at PRODUCTS of the maker's peak, links and memories carry BYTES of theirs, every row is as long as it
may be and every token of it is learned. Communication may hide behind products or not, so that a step has a shortest and a
longest time.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibtrain.config import RunConfig
from calibtrain.models.cost import Device, causal
from calibtrain.pipeline.plan_memory import ModelSize, rows_of, width_of
from calibtrain.training.deepspeed_config import BatchPlan

PRODUCTS, BYTES = 0.5, 0.7
LINKS = {"nvlink": 300e9, "pcie": 25e9, "ib": 50e9}
"""Bytes a second of one GPU, in one direction; ib: a card of 400 Gbit/s for each."""
TO_HOST = LINKS["pcie"]
HOST_MEMORY = 200e9
"""Bytes a second of a node's memory, shared by its ranks where the optimizer runs there."""
ADAM_BYTES = 12
"""Read and written for an element: gradient and master in fp32, and master again; so are its moments, whatever they take."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a run is planned for."""

    gpus: int  # of a node
    gib: float  # of a GPU
    nodes: int
    link: str  # within a node
    device: Device

    @property
    def world(self) -> int:
        """Ranks."""
        return self.gpus * self.nodes

    @property
    def bandwidth(self) -> float:
        """Of a collective over all ranks, which goes as fast as its slowest link. Bytes/s of a rank."""
        links = [LINKS[self.link]] * (self.gpus > 1) + [LINKS["ib"]] * (self.nodes > 1)
        return min(links, default=float("inf")) * BYTES


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step's parts on a rank, and its tokens over all ranks."""

    products: float
    communication: float
    optimizer: float
    tokens: int
    flops: float  # of the model, over all ranks: what is computed twice counts once

    @property
    def shortest(self) -> float:
        """With all communication hidden behind products."""
        return max(self.products, self.communication) + self.optimizer

    @property
    def longest(self) -> float:
        """With none of it hidden."""
        return self.products + self.communication + self.optimizer


def step_time(config: RunConfig, size: ModelSize, plan: BatchPlan, cluster: Cluster, length: int) -> StepTime:
    """Of rows of `length` tokens."""
    assert size.work is not None
    rows = rows_of(config, plan) * plan.accumulation_steps
    tokens, within = rows * length, config.data.max_length
    attended = rows * (length // within) * causal([within])
    once = size.work.step(tokens, tokens, attended)
    again = size.work.forward(tokens, 0, attended) if config.model.gradient_checkpointing else 0.0
    peak = cluster.device.bf16 if width_of(config) == 2 else cluster.device.fp32
    return StepTime(
        (once + again) / plan.sequence_parallel_size / (peak * PRODUCTS),
        _communication(config, size, plan, cluster) + _exchanges(config, size, plan, cluster, tokens),
        _optimizer(config, size, cluster),
        tokens * plan.groups,
        once * plan.groups,
    )


def _communication(config: RunConfig, size: ModelSize, plan: BatchPlan, cluster: Cluster) -> float:
    """Seconds of one rank's share of all collectives of a step, and of parameters that come from host memory."""
    stage, width, world = config.training.zero_stage, width_of(config), plan.world_size
    share, micro = (world - 1) / world, plan.accumulation_steps
    gradients = size.trainable * (4 if stage >= 2 else width) * share
    if stage == 0:
        moved = 2 * gradients
    elif stage == 1:
        moved = gradients + size.trainable * width * share
    elif stage == 2:
        moved = micro * gradients + size.trainable * width * share
    else:  # gathered for the forward and for the backward pass of each micro-batch
        moved = micro * (2 * size.bytes_in_training(width) * share + gradients)
    seconds = moved / cluster.bandwidth
    if config.training.offload_parameters:
        seconds += micro * 2 * size.bytes_in_training(width) / world / (TO_HOST * BYTES)
    return seconds


def _exchanges(config: RunConfig, size: ModelSize, plan: BatchPlan, cluster: Cluster, tokens: int) -> float:
    """Seconds in which ranks that share `tokens` exchange positions for heads, and results back."""
    shared, hidden = plan.sequence_parallel_size, size.hidden_size or 0
    passes = 3 if config.model.gradient_checkpointing else 2
    elements = tokens / shared * (2 * hidden * size.layers + size.cached)
    return passes * elements * width_of(config) * (shared - 1) / shared / cluster.bandwidth


def _optimizer(config: RunConfig, size: ModelSize, cluster: Cluster) -> float:
    training, ranks = config.training, cluster.world if config.training.zero_stage else 1
    passed = (size.trainable * ADAM_BYTES + 2 * size.bytes_of_moments(config)) / ranks
    if not training.offload_optimizer:
        return passed / (cluster.device.memory * BYTES)
    moved = size.trainable / ranks * (4 + width_of(config)) / (TO_HOST * BYTES)
    return moved + passed * cluster.gpus / (HOST_MEMORY * BYTES)

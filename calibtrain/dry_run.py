"""What `calibtrain train --dry-run` prints: the resolved config, the DeepSpeed JSON, ranks, data, steps and memory."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import told
from calibtrain.pipeline.plan_memory import ModelSize, memory_estimate, model_size
from calibtrain.training.deepspeed_config import BatchPlan, batch_plan, deepspeed_dict

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class RankRow:
    """One process of the job."""

    rank: int
    host: str
    local_rank: int
    device: str
    micro_batches: int


def rank_table(plan: BatchPlan, *, host: str, devices: Sequence[str]) -> list[RankRow]:
    """Ranks of a job on one machine: rank k uses the k-th visible device, or the CPU when there is none."""
    return [
        RankRow(rank, host, rank, devices[rank] if devices else "cpu", plan.accumulation_steps)
        for rank in range(plan.world_size)
    ]


def show(config: RunConfig, world_size: int) -> None:
    """Print everything that a run of `world_size` processes would use. Raises UserError as the run itself would."""
    from rich.console import Console
    from rich.table import Table

    from calibtrain.config_file import render_config

    plan = batch_plan(config.training, world_size)
    size: ModelSize | None = None
    mistake: UserError | None = None
    try:
        size = model_size(config)
    except UserError as error:
        mistake = error
    resolved = deepspeed_dict(config, world_size, hidden_size=size.hidden_size if size else None)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.rule("config")
    console.print(render_config(config).rstrip())
    if config.model.dtype == "auto":
        console.print(told(config))
    console.rule("DeepSpeed")
    console.print(json.dumps(resolved, indent=2))
    console.rule("ranks")
    table = Table("rank", "host", "local rank", "device", "micro-batches a step")
    for row in rank_table(plan, host=socket.gethostname(), devices=visible_devices(os.environ, world_size)):
        table.add_row(str(row.rank), row.host, str(row.local_rank), row.device, str(row.micro_batches))
    console.print(table)
    console.print(
        f"{plan.global_batch_size} records a step = {plan.micro_batch_size} x {plan.accumulation_steps} micro-batches "
        f"x {_groups(plan)}"
    )
    console.rule("data")
    try:
        show_data(config, world_size, console)
    except UserError as error:
        mistake = error
        console.print("see the message at the end")
    console.rule("memory of each rank")
    if size is None:
        console.print("see the message at the end")
    else:
        _show_memory(config, size, plan, console)
    if mistake is not None:
        raise mistake


def _groups(plan: BatchPlan) -> str:
    """Who passes micro-batches, in words."""
    shared = plan.sequence_parallel_size
    return (
        f"{plan.world_size} processes" if shared == 1 else f"{plan.groups} groups of {shared} processes that share rows"
    )


def show_data(config: RunConfig, world_size: int, console: Console) -> None:
    """Print what the run reads, trains on and asks. Raises UserError as the run would."""
    from calibtrain.pipeline.check import advice, check, count_tokens, evaluations, expected_steps, longest
    from calibtrain.pipeline.prepare import needs_rejected

    checked = check(config, world_size)
    if checked.finished:
        console.print(f"{config.output_dir} holds this very run, and it is finished: nothing will be trained")
    splits, seen = checked.prepared.splits, len(checked.examples)
    for line in [*checked.prepared.lines(), *checked.prepared.drops.lines()]:
        console.print(line)
    of = "" if checked.whole else f"of the first {seen + checked.drops.total:,} training records: "
    for line in checked.drops.lines():
        console.print(of + line)
    steps, about = expected_steps(config, checked), "" if checked.whole else "about "
    console.print(f"{about}{steps:,} optimiser steps of {checked.plan.global_batch_size} records")
    if checked.examples:
        tokens = count_tokens(config, checked)
        rows = f"packed into rows of {config.packing_tokens}" if config.packing_tokens else "one a row, padded"
        console.print(
            f"{tokens.held / tokens.steps:,.0f} tokens a step, {rows}: {1 - tokens.held / tokens.passed:.1%} padding "
            f"(over {tokens.steps} steps); about {tokens.passed * steps // tokens.steps:,} tokens pass in all"
        )
        found = ", ".join(f"{count} ({place})" for count, place in longest(checked))
        if needs_rejected(config, checked.prepared):
            console.print("rejected answers are still to be sampled from the model: these are the chosen ones' tokens")
        console.print(f"data.max_length {config.data.max_length}; {of}the longest are {found}")
    else:
        console.print("the model trains on its own answers, whose length nobody knows yet")
    for line in evaluations(config, steps, len(splits["calibration"])):
        console.print(f"asked while training: {line}")
    for line in advice(config, checked):
        console.print(f"look at {line}")


def _show_memory(config: RunConfig, size: ModelSize, plan: BatchPlan, console: Console) -> None:
    from rich.table import Table

    console.print(f"{size.parameters:,} parameters, {size.trainable:,} trained")
    states = Table("what", "GiB", "where")
    for name, (count, where) in memory_estimate(config, size, plan).items():
        states.add_row(name, f"{count / 2**30:.2f}", where)
    console.print(states)
    console.print("Activations of the layers come on top; `calibtrain plan` counts them, too.")


def visible_devices(environment: Mapping[str, str], world_size: int) -> list[str]:
    """Names of the devices that the ranks would use; empty means CPU. Raises UserError when they are too few."""
    from calibtrain.launchers.local import gpu_count

    count = gpu_count()
    if count == 0:
        return []
    listed = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    names = [f"cuda:{name}" for name in (listed or map(str, range(count)))]
    if world_size > len(names):
        raise UserError(f"{world_size} processes need as many GPUs, {len(names)} are visible: {', '.join(names)}")
    return names[:world_size]

"""Whole ORPO steps: calibtrain as its users get it against TRL's ORPOTrainer, on the same tokens, and what hooks add.

    python benchmarks/train_step.py --json benchmarks/results/train_step.json

Each contender meets calibtrain in turn. Both live in processes of their own, with the same number of threads and the
same settings of the allocator; the parent lets one of them take one step at a time, alternating, and waits. A step is
the whole loop's: fetching and collating, forward, backward, clipping, AdamW, bookkeeping. All take the same 8 pairs a
step, minimise the same loss (negative log-likelihood of prompt and chosen answer, beta 0.5), compute in `--dtype`; the
losses of their first step are in the report, to be compared. With `--shares` only the shares of our own step are
measured: products of the layers, attention, head, optimiser, communication, the rest, and cores that wait, of one
process with all cores and of two that share them.

- `calibtrain`: Trainer on DeepSpeed ZeRO-2, bf16 weights and fp32 masters, the default hooks.
- `calibtrain_responses`: the same with nll_scope=completion, our default and the paper's formula; TRL has no such option.
- `calibtrain_compiled`: the same as `calibtrain` with model.compile.
- `plain_torch`: the same module and optimiser in a loop without DeepSpeed, trainer and hooks.
- `trl_*`: ORPOTrainer with its own collator, gradient checkpointing off (it is on by default and slower). `autocast`:
  fp32 weights, computing in bf16 (`bf16=True`); `bf16`: weights and optimiser states in bf16, without fp32 masters;
  `_accumulated`: 2 micro-batches of half the pairs; `_compiled`: `torch_compile=True`, layer by layer. The summary
  takes the fastest that keeps fp32 masters, as ours does, in `*_against_any` the fastest of all, and in `*_compiled`
  both compiled.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _report import print_table, write_json
from _step_pairs import BETA, LEARNING_RATE, PAIRS, SHAPES, token_ids
from _step_shares import measure_shares
from _trl_step import trl_worker

from calibtrain.launchers.local import local_environment

EMBEDDED = "embedded:smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--blocks", type=int, default=15, help="blocks of 5 steps with and without hooks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--shares", action="store_true", help="where the seconds of our own step go, without peers")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and few steps: does it run")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.blocks = 2, 2
    if args.dtype == "fp32":
        args.only = [name for name in args.only if not name.startswith("trl_bf16")]
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _model_directory(Path(folder), args.smoke)
        if args.shares:
            show_shares(model, args.shapes, args.dtype, args.threads, args.json)
            return
        for shape in args.shapes:
            ratios = {}
            for name in args.only:
                found = measure(["calibtrain", name], model, shape, args.steps, args.threads, args.dtype)
                rows += found
                ratios[name] = found[0]["pairs_per_second"] / found[1]["pairs_per_second"]
            summary.update(summarize(shape, ratios))
        hooks = measure_hooks(model, args.shapes[-1], args.blocks, args.threads, args.dtype)
        rows.append(hooks)
        summary["hooks_overhead"] = hooks["seconds"] / hooks["seconds_without"] - 1
    print_table(f"ORPO steps in {args.dtype}", [{key: row.get(key, "") for key in rows[0]} for row in rows])
    print({key: round(value, 4) for key, value in summary.items()})
    if args.json:
        write_json(args.json, rows, summary)


def summarize(shape: str, ratios: dict[str, float]) -> dict[str, float]:
    """Speedups from how many times as many pairs a second calibtrain takes as each contender beside it."""
    eager = {name: ratio for name, ratio in ratios.items() if not name.endswith("_compiled")}
    any_peer = [ratio for name, ratio in eager.items() if name.startswith("trl_")]
    with_masters = [ratio for name, ratio in eager.items() if name.startswith("trl_autocast")]
    summary = {}
    for key, peers in ((f"speedup_{shape}", with_masters), (f"speedup_{shape}_against_any", any_peer)):
        if peers:
            summary[key] = min(peers)
        if peers and "calibtrain_responses" in ratios:
            summary[f"{key}_responses"] = min(peers) / ratios["calibtrain_responses"]
    if {"calibtrain_compiled", "trl_autocast_compiled"} <= ratios.keys():
        summary[f"speedup_{shape}_compiled"] = ratios["trl_autocast_compiled"] / ratios["calibtrain_compiled"]
    if "plain_torch" in ratios:
        summary[f"deepspeed_share_{shape}"] = 1 - ratios["plain_torch"]
    return summary


def show_shares(model: Path, shapes: list[str], dtype: str, threads: int, path: Path | None) -> None:
    """Print and write the shares of a step of each shape, on one process and on two."""
    rows = [measure_shares(trainer_for, model, shape, dtype, ranks, threads) for shape in shapes for ranks in (1, 2)]
    print_table(f"shares of a step in {dtype}", rows)
    summary = {f"{name}_{row['shape']}_{row['ranks']}": row[name] for row in rows for name in ("seconds", "products")}
    print({key: round(value, 4) for key, value in summary.items()})
    if path:
        write_json(path, rows, summary)


def measure(
    names: list[str], model: Path, shape: str, steps: int, threads: int, dtype: str = "bf16"
) -> list[dict[str, Any]]:
    """One row a contender: median seconds of a step, and the loss of the first one. One warm-up step each."""
    targets = {"calibtrain": calibtrain_worker, **CONTENDERS}
    workers = {name: Worker(partial(targets[name], precision=dtype), threads, model, shape) for name in names}
    try:
        losses = {name: worker.step()["loss"] for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(steps):
            for name, worker in workers.items():
                seconds[name].append(worker.step()["seconds"])
    finally:
        for worker in workers.values():
            worker.stop()
    return [
        {
            "shape": shape,
            "contender": name,
            "pairs_per_second": PAIRS / statistics.median(seconds[name]),
            "seconds": statistics.median(seconds[name]),
            "fastest": min(seconds[name]),
            "slowest": max(seconds[name]),
            "first_loss": losses[name],
        }
        for name in names
    ]


def measure_hooks(model: Path, shape: str, blocks: int, threads: int, dtype: str) -> dict[str, Any]:
    """Blocks of steps, one log each, with every hook and without any, in turn, in one process."""
    worker = Worker(partial(hooks_worker, precision=dtype), threads, model, shape)
    try:
        worker.step()
        timed = [worker.step() for _ in range(blocks)]
    finally:
        worker.stop()
    with_hooks, without = (statistics.median(one[key] for one in timed) for key in ("with", "without"))
    return {
        "shape": shape, "contender": "hooks", "pairs_per_second": PAIRS / with_hooks, "seconds": with_hooks,
        "fastest": min(one["with"] for one in timed), "slowest": max(one["with"] for one in timed), "first_loss": "",
        "seconds_without": without,
    }  # fmt: skip


class Worker:
    """A contender in a process of its own that takes one step each time it is asked."""

    def __init__(self, target: Callable[[Connection, Path, str], None], threads: int, model: Path, shape: str) -> None:
        # What `calibtrain train` sets on a CPU, for the peer too: large buffers take huge pages.
        os.environ.update(local_environment({"OMP_NUM_THREADS": str(threads)}, num_processes=1, gpus=0))
        self.pipe, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=target, args=(theirs, model, shape), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it is ready

    def step(self) -> dict[str, float]:
        """One step, or block of steps; what the contender says of it."""
        self.pipe.send("step")
        return dict(self.pipe.recv())

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()


def trainer_for(
    model: Path,
    shape: str,
    scope: str,
    hooks: Callable[[Any], list[Any]],
    compiled: bool = False,
    precision: str = "bf16",
) -> Any:
    """The Trainer as `calibtrain train` makes it, over the shared token ids."""
    from calibtrain.confidence.answering import Answerer
    from calibtrain.config import RunConfig
    from calibtrain.data.encode import Encoded
    from calibtrain.data.templates import Template
    from calibtrain.distributed import start_world
    from calibtrain.hooks.base import HookList
    from calibtrain.losses.terms import CHOSEN, REJECTED
    from calibtrain.models.loading import load_tokenizer
    from calibtrain.pipeline.train import build_model
    from calibtrain.training.deepspeed_config import batch_plan
    from calibtrain.training.engine import start_engine
    from calibtrain.training.trainer import Trainer

    config = RunConfig.model_validate(
        {
            "output_dir": tempfile.mkdtemp(dir=model.parent),
            "model": {"source": str(model), "compile": compiled, "dtype": precision},
            "data": {"max_length": 512},
            "objective": {"name": "orpo", "beta": BETA, "nll_scope": scope},
            "training": {"micro_batch_size": PAIRS // int(os.environ.get("WORLD_SIZE", 1)), "global_batch_size": PAIRS,
                         "learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0.0},
            "tracking": {"mode": "offline"},
        }
    )  # fmt: skip
    world = start_world()
    module = build_model(config)
    engine = start_engine(module, config, world)
    template = Template("plain", load_tokenizer(config.model))
    vocabulary = module.policy.causal_model.config.vocab_size
    examples = [
        tuple(
            Encoded((*prompt, *answer), len(prompt), role, index, pair_id=index)
            for role, answer in ((CHOSEN, chosen), (REJECTED, rejected))
        )
        for index, (prompt, chosen, rejected) in enumerate(token_ids(shape, vocabulary, PAIRS))
    ]
    return Trainer(
        config=config,
        engine=engine,
        examples=examples,
        origins=[""] * len(examples),
        plan=batch_plan(config.training, world.size),
        total_steps=1_000_000,
        world=world,
        answerer=Answerer(module, template, config.evaluation, world),
        hooks=HookList(hooks(config)),
        output_dir=config.output_dir,
        data_hash="",
        shared_prefix=True,
    )


def calibtrain_worker(
    pipe: Connection, model: Path, shape: str, scope: str = "full", compiled: bool = False, precision: str = "bf16"
) -> None:
    """The Trainer's own loop; a hook at the end of each step reports it and waits for the next."""
    from calibtrain.hooks.base import Hook
    from calibtrain.hooks.factory import default_hooks
    from calibtrain.training.checkpoint import Progress
    from calibtrain.training.losses import term_names

    class Pace(Hook):
        name = "pace"
        loss = float("nan")
        started = 0.0

        def on_micro_batch(self, record: Any) -> None:
            sums, counts = record.term_sums, record.term_counts
            self.loss = sum(float(sums[name] / counts[name]) * (BETA if name != "nll" else 1.0) for name in sums)

        def on_step(self, record: Any) -> None:
            pipe.send({"seconds": time.perf_counter() - self.started, "loss": self.loss})
            self.wait()

        def wait(self) -> None:
            pipe.recv()
            self.started = time.perf_counter()

    pace = Pace()
    trainer = trainer_for(
        model, shape, scope, lambda config: [*default_hooks(config, 0, term_names(config)), pace], compiled, precision
    )
    _start_hooks(trainer)
    gc.collect()
    pipe.send("ready")
    pace.wait()
    trainer.fit(Progress())


def hooks_worker(pipe: Connection, model: Path, shape: str, precision: str = "bf16") -> None:
    """Blocks of `log_every` steps with all hooks and with none."""
    from calibtrain.hooks.base import HookList
    from calibtrain.hooks.factory import default_hooks
    from calibtrain.training.checkpoint import Progress
    from calibtrain.training.losses import term_names

    trainer = trainer_for(
        model, shape, "full", lambda config: default_hooks(config, 0, term_names(config)), precision=precision
    )
    _start_hooks(trainer)
    lists = {"with": trainer.hooks, "without": HookList([])}
    progress, size = Progress(), trainer.config.training.log_every
    pipe.send("ready")
    turn = 0
    while pipe.recv():
        seconds = {}
        for name in list(lists)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            progress = replace(trainer, hooks=lists[name], total_steps=progress.step + size).fit(progress)
            seconds[name] = (time.perf_counter() - started) / size
        turn += 1
        pipe.send(seconds)


def _start_hooks(trainer: Any) -> None:
    from calibtrain.hooks.records import RunRecord

    config = trainer.config
    trainer.hooks.dispatch("on_start", RunRecord(config.resolved(), config.output_dir, 1000, 0, 0, 1))


def plain_worker(pipe: Connection, model: Path, shape: str, precision: str = "bf16") -> None:
    """The same forward and optimiser without DeepSpeed: fp32 masters, clipping, fused AdamW."""
    import torch

    from calibtrain.models.loss_model import TrainStep
    from calibtrain.training.engine import optimizer_groups

    trainer = trainer_for(model, shape, "full", lambda config: [], precision=precision)
    config, batch = trainer.config, trainer._window(0)[0].batch
    trainer.engine.deepspeed.destroy()
    from calibtrain.pipeline.train import build_model

    module = build_model(config).train()
    groups = optimizer_groups(module, config)
    weights = [weight for group in groups for weight in group["params"]]
    masters = [weight.detach().float() for weight in weights]
    split = len(groups[0]["params"])
    optimizer = torch.optim.AdamW(
        [{**groups[0], "params": masters[:split]}, {**groups[1], "params": masters[split:]}], fused=True
    )
    divisors = {name: count.float() for name, count in module.counts(batch).items()}
    pipe.send("ready")
    while pipe.recv():
        started = time.perf_counter()
        loss, _ = module(TrainStep(batch, divisors))
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        pipe.send({"seconds": time.perf_counter() - started, "loss": float(loss.detach())})


CONTENDERS: dict[str, Callable[[Connection, Path, str], None]] = {
    "calibtrain_responses": partial(calibtrain_worker, scope="completion"),
    "calibtrain_compiled": partial(calibtrain_worker, compiled=True),
    "plain_torch": plain_worker,
    "trl_autocast": trl_worker,
    "trl_autocast_accumulated": partial(trl_worker, micro_batches=2),
    "trl_autocast_compiled": partial(trl_worker, compiled=True),
    "trl_bf16": partial(trl_worker, dtype="bfloat16"),
    "trl_bf16_accumulated": partial(trl_worker, dtype="bfloat16", micro_batches=2),
}


def _model_directory(folder: Path, smoke: bool) -> Path:
    from calibtrain.models.loading import local_path

    target = folder / "model"
    if not smoke:
        target.symlink_to(local_path(EMBEDDED))
        return target
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.tiny import write_tiny_model

    return write_tiny_model(target)


if __name__ == "__main__":
    main()

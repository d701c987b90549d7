"""What `calibtrain plan` says beside what can be measured here: bytes that a rank holds, and seconds of a step.

    python benchmarks/plan_error.py --json benchmarks/results/plan_error.json

Trains three steps on full rows for each model, dtype and ZeRO stage, on one CPU rank and on two. Counted are the storages of
all tensors that are alive behind a backward pass (parameters, gradients, optimizer states and DeepSpeed's buffers), and what
autograd saves in a forward pass. Seconds are planned with this machine's own product rate, measured beside the run: on a
machine that others use they say little.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import print_table, write_json

LENGTH, ROWS = 120, 4  # 480 tokens: no weight has that size, by which it would be taken for one
STAGES = ("0", "1", "2", "3")
CASES = (("tiny", "fp32"), ("135M", "fp32"), ("135M lora", "fp32"), ("135M", "bf16"), ("135M lora", "bf16"))
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--cases", nargs="+", choices=sorted({name for name, _ in CASES}), help="all unless named")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    rows = []
    wanted = [case for case in CASES if case[0] in (args.cases or [case[0]]) and case[1] in args.dtypes]
    for name, dtype in wanted:
        for stage in STAGES:
            for ranks in args.ranks:
                if not (stage == "0" and (dtype == "bf16" or ranks > 1)):
                    rows.append({"model": name, "dtype": dtype, "stage": int(stage), "ranks": ranks})
                    rows[-1] |= measured(name, dtype, stage, ranks)
                    print(rows[-1], flush=True)
    print_table("plan beside what was measured", rows)
    summary = {
        f"largest_error_of_{what}": max(abs(row[f"{what}_planned"] / row[what] - 1) for row in rows)
        for what in ("states_mib", "activations_mib")
    }
    ratios = sorted(row["seconds"] / row["seconds_planned"] for row in rows)
    summary |= {"seconds_over_planned_least": ratios[0], "seconds_over_planned_most": ratios[-1]}
    print(summary)
    if args.json:
        write_json(args.json, rows, summary)


def measured(name: str, dtype: str, stage: str, ranks: int) -> dict[str, Any]:
    """Of rank 0, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        program = [str(Path(__file__).resolve()), "--child", name, source(name, folder), dtype, stage, str(target)]
        argv = [sys.executable, *launcher, *program]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(target.read_text())


def child(name: str, place: str, dtype: str, stage: str, target: str) -> None:
    import torch

    from calibtrain.config import RunConfig
    from calibtrain.data.collate import collate
    from calibtrain.data.encode import Encoded
    from calibtrain.distributed import leave_world, start_world
    from calibtrain.losses.terms import CHOSEN
    from calibtrain.models.cost import Device
    from calibtrain.models.loss_model import TrainStep
    from calibtrain.pipeline.plan_memory import SAVED, activations, counted, memory_estimate, model_size, width_of
    from calibtrain.pipeline.plan_time import PRODUCTS, Cluster, step_time
    from calibtrain.pipeline.train import build_model
    from calibtrain.training.deepspeed_config import batch_plan
    from calibtrain.training.engine import start_engine
    from calibtrain.training.losses import term_names

    world = start_world()
    config = RunConfig.model_validate(
        {
            "model": {"source": place, "dtype": dtype, "lora": {} if name.endswith("lora") else None},
            "data": {"max_length": LENGTH, "splits": {}},
            "objective": {"name": "sft"},
            "training": {"zero_stage": int(stage), "micro_batch_size": ROWS, "global_batch_size": ROWS * world.size},
        }
    )
    engine = start_engine(build_model(config), config, world)
    ids = torch.randint(3, 250, (ROWS, LENGTH)).tolist()
    batch = collate([Encoded(tuple(row), 1, CHOSEN, i) for i, row in enumerate(ids)], 0, config.nll_scope)
    step = TrainStep(batch, {term: torch.tensor(float(ROWS * LENGTH)) for term in term_names(config)})
    seconds, saved, states = [], {}, 0
    for number in range(3):
        engine.set_learning_rate(number, 3, config.training)
        started = time.perf_counter()
        if number == 1:
            with counted(engine.module) as seen:
                loss, _ = engine.deepspeed(step)
            saved = dict(seen)
        else:
            loss, _ = engine.deepspeed(step)
        engine.backward(loss, last=True)
        if number == 1:
            del loss
            states = alive()
        engine.step()
        seconds.append(time.perf_counter() - started)
    rate = product_rate(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
    size, plan = model_size(config), batch_plan(config.training, world.size)
    here = Device(rate / PRODUCTS, rate / PRODUCTS, 10e9)  # what is measured is reached
    planned = memory_estimate(config, size, plan)
    time_planned = step_time(config, size, plan, Cluster(world.size, 0, 1, "pcie", here), LENGTH)
    if world.is_main:
        found = {
            "states_mib": states / 2**20,
            "states_mib_planned": sum(count for count, where in planned.values() if where != SAVED) / 2**20,
            "activations_mib": sum(saved.values()) / 2**20,
            "activations_mib_planned": (
                activations(config, LENGTH).of(ROWS, size.layers, checkpointing=False)
                + ROWS * LENGTH * (size.hidden_size or 0) * width_of(config)  # the head's input
            )
            / 2**20,
            "seconds": seconds[-1],
            "seconds_planned": time_planned.longest,
            "gflops": rate / 1e9,
        }
        Path(target).write_text(json.dumps(found))
    leave_world()


def source(name: str, folder: str) -> str:
    """The embedded model, or a random small one with its tokenizer."""
    if name != "tiny":
        return "embedded:smollm2-135m-instruct"
    from transformers import LlamaConfig, LlamaForCausalLM

    from calibtrain.config import ModelConfig
    from calibtrain.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alive() -> int:
    """Bytes of the storages of all tensors that Python knows, each once."""
    import torch

    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if not one.is_meta}
    return sum(storages.values())


def product_rate(dtype: Any) -> float:
    """FLOP/s of a product as wide as a layer's, the best of five."""
    import torch

    left, right = torch.randn(512, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            left @ right
        best = min(best, time.perf_counter() - started)
    return 20 * 2 * 512 * 576 * 1536 / best


if __name__ == "__main__":
    main()

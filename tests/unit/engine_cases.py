"""Run by test_config_deepspeed under torchrun: three steps for each ZeRO stage and dtype, and one plain process."""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch

from calibtrain.config import RunConfig
from calibtrain.distributed import leave_world, start_world
from calibtrain.training.deepspeed_config import deepspeed_dict

WORLD, STEPS, MICRO = 2, 3, 2


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.1}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def rows(step, rank, micro):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + 10 * rank + micro))


def loss_sum(output):
    return output.float().square().sum() / (2 * MICRO * WORLD)


def reference():
    model, optimizer = build()
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            for micro in range(MICRO):
                loss_sum(model(rows(step, rank, micro))).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return norms


def engine_norms(stage, dtype, offload, rank):
    training = {"zero_stage": stage, "micro_batch_size": 2, "global_batch_size": 2 * MICRO * WORLD,
                "offload_optimizer": offload, "offload_parameters": offload and stage == 3}  # fmt: skip
    config = RunConfig.model_validate({"model": {"dtype": dtype}, "training": training})
    model, optimizer = build()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_dict(config, WORLD))
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO):
            output = engine(rows(step, rank, micro).to(torch.bfloat16 if dtype == "bf16" else torch.float32))
            engine.backward(loss_sum(output) * WORLD, scale_wrt_gas=False)
            engine.step()  # counts micro-batches: the update happens at the last one
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return norms


if __name__ == "__main__":
    start_world()
    rank = int(os.environ["RANK"])
    cases = [
        {"stage": stage, "dtype": dtype, "offload": offload, "norms": engine_norms(stage, dtype, offload, rank)}
        for stage in range(4)
        for dtype in (("fp32", "bf16") if stage else ("fp32",))
        for offload in ((False, True) if stage else (False,))
    ]
    if rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump({"reference": reference(), "cases": cases}, file)
    leave_world()

"""Run by test_causal_lm on several ranks: gradients of one step of a user's own loop, under each way to wrap the model.

Usage: causal_lm_cases.py FOLDER CASE_NAMES (comma-separated). Rank 0 writes FOLDER/<case>-<ranks>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from calibtrain.distributed import leave_world
from calibtrain.losses import (
    LabelSmoothingLoss,
    ORPOLoss,
    SFTLoss,
    batch_from_labels,
    global_counts,
    loss_terms_from_model,
    normalized_loss,
)
from calibtrain.losses.terms import Batch
from tests.distributed.jobs import SHARDED
from tests.tiny import tiny_model

STEPS, PAIRS = 2, 4
ZERO = {f"zero{stage}": stage for stage in (0, 1, 2, 3)}


def micro_batches(rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    """Pairs of very different lengths, one a micro-batch, dealt out to the ranks."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for pair in range(PAIRS):
        width = 6 + 4 * pair
        input_ids = torch.randint(3, 400, (2, width), generator=generator)
        labels = input_ids.clone()
        labels[:, : 2 + pair] = -100
        labels[1, -2:] = -100
        batches.append({"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)})
    return batches[rank::ranks]


def batch_of(inputs: dict[str, torch.Tensor], kind: str) -> Batch:
    """Pairs, or rows to learn; "packed": the first rank has its rows in one, the others have not."""
    if kind == "packed" and dist.get_rank() == 0:
        ids, labels = (inputs[name].reshape(1, -1) for name in ("input_ids", "labels"))
        return batch_from_labels(ids, labels, None, torch.arange(ids.shape[1] // 2).repeat(2)[None])
    return batch_from_labels(**inputs, pairs=kind not in ("packed", "sft"))


def wrap(name: str) -> tuple[torch.nn.Module, Any, Any]:
    """(what the loop calls, its backward, how to read a full gradient)."""
    model = tiny_model(tied=name != "zero3_untied").train()
    if "checkpointed" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=name == "ddp_find_unused")
        return wrapped, lambda loss: loss.backward(), lambda parameter: parameter.grad
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": PAIRS // dist.get_world_size(),
        "zero_optimization": {**SHARDED, "stage": int(name[4])},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, lambda loss: engine.backward(loss, scale_wrt_gas=False), safe_get_full_grad


def run_case(name: str) -> dict[str, Any]:
    """Gradients before, and loss after one SGD step."""
    model, backward, gradient_of = wrap(name)
    ranks = dist.get_world_size()
    kind = name.rpartition("_")[2]
    smoothing = LabelSmoothingLoss(token_set=range(3, 200), epsilon=0.3)
    loss = {"set": smoothing, "sft": SFTLoss(), "packed": SFTLoss()}.get(kind, ORPOLoss(beta=0.5))
    gradients: list[dict[str, torch.Tensor]] = []
    losses = []
    for _ in range(STEPS):
        window = [batch_of(inputs, kind) for inputs in micro_batches(dist.get_rank(), ranks)]
        counts = global_counts(loss, window)
        shares = []
        for number, batch in enumerate(window):
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = number == len(window) - 1
            share = normalized_loss(loss_terms_from_model(model, loss, batch)[0], counts)
            backward(share * ranks)
            shares.append(share.detach())
            if hasattr(model, "step") and number < len(window) - 1:
                model.step()
        total = torch.stack(shares).sum()
        dist.all_reduce(total)
        losses.append(total.item())
        found = {n: gradient_of(p).clone() for n, p in model.module.named_parameters()}
        gradients.append(found)
        if hasattr(model, "step"):
            model.step()
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    if hasattr(model, "destroy"):
        model.destroy()
    return {"gradients": gradients, "losses": losses}


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    dist.init_process_group("gloo")
    for name in names:
        result = run_case(name)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}-{dist.get_world_size()}.pt")
    dist.barrier()
    leave_world()

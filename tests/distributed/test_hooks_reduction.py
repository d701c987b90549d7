"""Hooks on two gloo ranks: one vector, the same metrics everywhere, also when a hook fails on one rank."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from calibtrain.distributed import leave_world
from calibtrain.errors import UserError
from calibtrain.hooks.base import Hook, HookList
from calibtrain.hooks.records import RunRecord


class Sum(Hook):
    def __init__(self, name, fails=False):
        self.name, self.fails, self.total = name, fails, torch.zeros(2)

    def on_start(self, record):
        if self.fails:
            raise RuntimeError("broken")
        self.total += record.rank + 1

    def sums(self):
        return {"b": self.total, "a": self.total.sum()}

    def compute(self, sums):
        return {f"{self.name}/a": sums["a"], f"{self.name}/b": sums["b"][1]}


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = RunRecord({}, Path(folder), 1, 0, rank, 2)
    # The order differs between ranks, and one hook fails on rank 1 alone.
    hooks = [Sum("x"), Sum("y", fails=rank == 1)]
    hook_list = HookList(hooks if rank == 0 else hooks[::-1])
    hook_list.dispatch("on_start", run)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args), all_reduce(*args, **kwargs))[1]
    metrics = hook_list.reduce_and_log(1, 1)
    dist.all_reduce = all_reduce
    try:
        HookList([Sum("x")] if rank == 0 else []).dispatch("on_start", run)
        refused = False
    except UserError:
        refused = True
    result = {"metrics": metrics, "calls": len(calls), "disabled": sorted(hook_list.disabled), "refused": refused}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    leave_world()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_two_ranks(tmp_path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # x: 1 + 2; y: rank 0's 1 alone, because the failing hook counts as zeros.
    assert first["metrics"] == second["metrics"] == {"x/a": 6.0, "x/b": 3.0, "y/a": 2.0, "y/b": 1.0}
    assert first["calls"] == second["calls"] == 1
    assert (first["disabled"], second["disabled"]) == ([], ["y"])
    assert first["refused"]
    assert second["refused"]

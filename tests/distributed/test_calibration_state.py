"""Metrics and observed ranges of two ranks, with uneven and empty shards, are those of one process on all samples."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.distributed import leave_world
from calibtrain.quantization.affine import Grid
from calibtrain.quantization.observers import LeastError, MinMax, Percentile

pytestmark = pytest.mark.distributed

SHARDS = {"uneven": (0, 137, 500), "first empty": (0, 0, 500), "second empty": (0, 500, 500), "both empty": (0, 0, 0)}


def samples():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(500, generator=generator, dtype=torch.float64)
    right = torch.rand(500, generator=generator, dtype=torch.float64) < q
    return torch.where(torch.arange(500) % 2 == 0, q, torch.exp(-200 * q)), right  # each other one of up to 200 nats


def activations():
    return torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) ** 3


def observers():
    """Of a tensor and of its channels."""
    return [
        one
        for channels in (None, 3)
        for one in (MinMax("x", channels), Percentile("x", channels, p=95.0), LeastError("x", Grid(4), channels))
    ]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _reduced_range(observer, bounds):
    observer.update(activations()[slice(*bounds)])
    observer.all_reduce()
    return torch.stack(observer.range()) if bool((observer.low <= observer.high).all()) else None


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    q, y = samples()
    merged = {}
    for name, bounds in SHARDS.items():
        own = slice(bounds[rank], bounds[rank + 1])
        local = CalibrationState().update(q[own], y[own])
        before = local.state_dict()
        merged[name] = local.all_reduce().state_dict()
        for key, tensor in before.items():
            assert torch.equal(tensor, local.state_dict()[key])
    for name, bounds in SHARDS.items():
        merged[f"ranges, {name}"] = [_reduced_range(one, bounds[rank : rank + 2]) for one in observers()]
    torch.save(merged, f"{folder}/{rank}.pt")
    leave_world()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(worker, (free_port(), str(folder)), nprocs=2, join=False, start_method="spawn")
    try:
        for _ in range(24):
            if context.join(timeout=5):
                break
        else:
            pytest.fail("the two ranks did not finish within 120 s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SHARDS)
def test_all_reduced_state_is_that_of_all_samples(reduced, name):
    q, y = samples()
    whole = state_of(q[: SHARDS[name][2]], y[: SHARDS[name][2]])
    for rank in reduced:
        for field in CalibrationState.FIELDS:
            assert rank[name][field].dtype == getattr(whole, field).dtype
            torch.testing.assert_close(rank[name][field], getattr(whole, field), rtol=1e-12, atol=1e-12)
        state = CalibrationState.from_tensors(rank[name])
        assert summary(state) == pytest.approx(summary(whole), rel=1e-9, abs=1e-12, nan_ok=True)
    for field in CalibrationState.FIELDS:
        assert torch.equal(reduced[0][name][field], reduced[1][name][field])


@pytest.mark.parametrize("name", SHARDS)
def test_observed_ranges_of_two_ranks_are_those_of_one(reduced, name):
    for rank in reduced:
        for found, whole in zip(rank[f"ranges, {name}"], observers(), strict=True):
            whole.update(activations()[: SHARDS[name][2]])
            assert (found is None) == (name == "both empty")
            assert found is None or torch.equal(found, torch.stack(whole.range()))

"""SmoothQuant and AWQ on two ranks, each with its share of the texts, find what one process finds with all of them."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from calibtrain.distributed import leave_world
from calibtrain.quantization.awq import awq_block
from calibtrain.quantization.blocks import find_blocks, first_inputs, matrices_in
from calibtrain.quantization.folds import folds_of
from calibtrain.quantization.schemes import scheme_of
from calibtrain.quantization.smoothquant import smooth_block
from tests.unit.quantization.test_awq import texts, uneven

pytestmark = pytest.mark.distributed


def searched(part):
    """Norms and ranges of the first block after each search on these texts."""
    found = {}
    for method in ("smoothquant", "awq"):
        model = uneven()
        block, batches = find_blocks(model)[1][0], first_inputs(model, part, pad_id=2, size=4)
        if method == "awq":
            scheme = scheme_of("w4a16", group_size=32, asymmetric=True)
            ranges = awq_block(block, 0, batches, folds_of(model, block), scheme, matrices_in(block))
            found |= {f"{name} {end}": pair[end] for name, pair in ranges.items() for end in (0, 1)}
        else:
            smooth_block(block, 0, batches, folds_of(model, block), further=True)
        found |= {f"{method} {name}": parameter.data for name, parameter in block.named_parameters()}
    return found


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(searched(texts()[:5] if rank == 0 else texts()[5:]), f"{folder}/{rank}.pt")
    leave_world()


def test_two_ranks_find_what_one_finds(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.start_processes(worker, (port, str(tmp_path)), nprocs=2, join=False, start_method="spawn")
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
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone, half = searched(texts()), searched(texts()[:5])
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = [torch.isclose(first[name], one, rtol=1e-3).float().mean() for name, one in alone.items()]
    assert min(same) > 0.95
    assert not all(torch.allclose(half[name], one, rtol=1e-2) for name, one in alone.items())

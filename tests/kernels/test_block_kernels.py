"""The compiled CPU kernel against its PyTorch twin in float64, and how it is built, shared and done without."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.ops import block_cpp, block_torch, dispatch, fused_linear_token_stats
from calibtrain.ops.head import Head

needs_compiler = pytest.mark.skipif(block_cpp.load() is None, reason="no C++ compiler here")
HEADS = [Head(), Head(logit_scale=0.3), Head(softcap=4.0), Head(logit_scale=1.7, softcap=3.0)]
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)]


def make_block(tokens, width, dtype, with_bias):
    generator = torch.Generator().manual_seed(width)
    products = (torch.randn(tokens, width, generator=generator) * 1.5).to(dtype)
    bias = torch.randn(width, generator=generator) if with_bias else None
    return products, torch.randint(0, 2 * width, (tokens,), generator=generator), bias


@needs_compiler
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 255, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_sums_equal_those_of_pytorch(dtype, width, head, with_bias):
    states = []
    for kernels, compute in ((block_cpp, torch.float32), (block_torch, torch.float64)):
        state, top = block_torch.new_state(7, torch.device("cpu"))
        products, targets, bias = make_block(7, 2 * width, dtype, with_bias)
        for start in (0, width):
            block = products[:, start : start + width].contiguous()
            block_bias = None if bias is None else bias[start : start + width].contiguous()
            if compute == torch.float64:
                block, block_bias = block.double(), None if bias is None else block_bias.double()
            kernels.update_stats(state, top, block, start, targets % (2 * width), block_bias, head)
        states.append((state, top))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=3e-6, atol=2e-5)
    z = block_torch._logits(products, None if bias is None else bias.double(), head, torch.float64)
    tops = [z.gather(1, top[:, None]) for _, top in states]  # two entries may be equal: which is the first is not said
    torch.testing.assert_close(tops[0], tops[1], rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 255, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_gradient_equals_that_of_pytorch(dtype, tolerance, width, head, with_bias):
    products, targets, bias = make_block(7, width, dtype, with_bias)
    exact = products.double()
    wide_bias = None if bias is None else bias.double()
    z = block_torch._logits(exact, wide_bias, head, torch.float64)
    peak = z.max(dim=1).values
    coefficients = torch.cat([
        torch.stack([peak, (z - peak[:, None]).exp().sum(dim=1).log()]),
        torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    ])  # fmt: skip
    block_torch.form_gradient(exact, 0, targets, coefficients, wide_bias, head)
    block_cpp.form_gradient(products, 0, targets, coefficients.float(), bias, head)
    torch.testing.assert_close(products.double(), exact, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_rows_are_written_to_the_last_entry_and_no_further():
    memory = torch.full((3 * 17 + 8,), 7.0)
    products = memory[: 3 * 17].view(3, 17)
    products.fill_(float("nan"))
    products.copy_(torch.randn(3, 17))
    coefficients = torch.zeros(6, 3)
    coefficients[2], coefficients[5] = 1e-9, 0.5
    block_cpp.form_gradient(products, 0, torch.tensor([0, 16, 99]), coefficients, None, Head())
    assert memory[3 * 17 :].eq(7.0).all()
    assert products.isfinite().all()
    assert products[0, 0] == products[1, 16] == 0.5
    assert (products[2] < 1e-6).all()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_an_entry_that_is_not_finite_poisons_its_row(bad, softcap):
    products = torch.randn(3, 50)
    products[1] = bad  # no entry is larger than any other
    state, top = block_torch.new_state(3, torch.device("cpu"))
    block_cpp.update_stats(state, top, products, 0, torch.zeros(3, dtype=torch.int64), None, Head(softcap=softcap))
    assert state[block_torch.POISON].isnan().tolist() == [False, True, False]
    assert (top < 50).all()


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads():
    hidden = torch.randn(301, 16, requires_grad=True)
    weight = torch.randn(1000, 16)
    found, threads = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        stats = fused_linear_token_stats(hidden, weight, torch.arange(301))
        found.append(stats.entropy.detach())
    torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_the_variable_names_a_path_or_is_refused(monkeypatch):
    tensors = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    monkeypatch.delenv("CALIBTRAIN_OPS", raising=False)
    assert [dispatch.ops_path(one) for one in tensors.values()] == ["cpp", "cpp", "torch"]
    monkeypatch.setenv("CALIBTRAIN_OPS", "reference")
    assert dispatch.ops_path(tensors[torch.float32]) == "reference"
    monkeypatch.setenv("CALIBTRAIN_OPS", "cuda")
    with pytest.raises(UserError, match="expected one of reference, torch, cpp, triton"):
        dispatch.ops_path(tensors[torch.float32])
    monkeypatch.setenv("CALIBTRAIN_OPS", "cpp")
    with pytest.raises(UserError, match="float32 and bfloat16 on CPUs"):
        dispatch.ops_path(tensors[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_path_is_the_same_function(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).to(dtype).requires_grad_()
    found = {}
    for path in ("reference", "torch"):
        monkeypatch.setenv("CALIBTRAIN_OPS", path)
        stats = fused_linear_token_stats(hidden, weight, torch.arange(5))
        gradients = torch.autograd.grad((stats.logprob * stats.entropy).sum(), (hidden, weight))
        found[path] = (*stats[:3], *gradients)
    # Of the whole tensor: in bf16 single small elements are off by more than themselves.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(*found.values(), strict=True):
        assert float((one - other).detach().float().norm()) <= tolerance * float(one.detach().float().norm())


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path))
    block_cpp.load.cache_clear()
    yield tmp_path / "kernels"
    monkeypatch.undo()
    block_cpp.load.cache_clear()


def test_without_a_compiler_pytorch_does_the_work_and_says_so_once(empty_cache, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stats = fused_linear_token_stats(torch.randn(3, 4), torch.randn(9, 4), torch.arange(3))
    assert stats.logprob.isfinite().all()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the fused ops run in plain PyTorch, which is slower"
    ]


@needs_compiler
@pytest.mark.parametrize("broken", ["compiler", "cache"])
def test_a_failed_build_is_told_and_done_without(empty_cache, broken, monkeypatch, caplog):
    if broken == "compiler":
        monkeypatch.setattr(block_cpp, "FLAGS", ("-no-such-flag",))
    else:
        empty_cache.parent.joinpath("kernels").write_text("a file where the directory should be")
    assert block_cpp.load() is None
    assert "no-such-flag" in caplog.text or "kernels" in caplog.text
    assert fused_linear_token_stats(torch.randn(3, 4), torch.randn(9, 4), torch.arange(3)).logprob.isfinite().all()


def _load_in_child(_):
    return block_cpp.load() is not None


@needs_compiler
def test_processes_that_start_together_build_once(empty_cache, capfd):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_load_in_child, range(3), chunksize=1) == [True] * 3
    assert capfd.readouterr().err.count("building the CPU kernel") == 1
    assert len(list(empty_cache.glob("*.so"))) == 1
    assert not [path for path in empty_cache.iterdir() if path.is_dir()]  # nothing half-built is left


@needs_compiler
def test_a_lock_that_is_held_or_left_behind_cannot_hang(empty_cache, monkeypatch):
    import fcntl

    path = empty_cache / f"token_stats-{block_cpp._key(shutil.which('c++') or shutil.which('g++'))}.so"
    empty_cache.mkdir()
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True);"
        " time.sleep(60)"
    )
    lock = str(path.with_suffix(".lock"))
    holder = subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        monkeypatch.setattr(block_cpp, "BUILD_SECONDS", 30)
        monkeypatch.setattr(block_cpp.time, "monotonic", iter(range(0, 10**6, 20)).__next__)
        assert block_cpp.load() is not None  # waited its time, then built a copy of its own
    finally:
        holder.kill()
        holder.wait()
    path.unlink()
    block_cpp.load.cache_clear()
    assert block_cpp.load() is not None  # the lock went with its holder
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@needs_compiler
def test_the_library_belongs_to_one_processor_and_source(empty_cache, monkeypatch):
    compiler = shutil.which("c++") or shutil.which("g++")
    before = block_cpp._key(compiler)
    monkeypatch.setattr(block_cpp, "FLAGS", (*block_cpp.FLAGS, "-g"))
    assert block_cpp._key(compiler) != before
    assert isinstance(block_cpp.load(), ctypes.CDLL)
    assert oct(os.stat(empty_cache).st_mode)[-3:] == "700"


BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
MEMORY = """
import ctypes, gc, sys, torch
sys.path.insert(0, sys.argv[3])
from fused_loss import peak_growth
from calibtrain.ops import fused_linear_token_stats
tokens, vocabulary = int(sys.argv[1]), int(sys.argv[2])
hidden = torch.randn(tokens, 16, requires_grad=True)
weight = torch.randn(vocabulary, 16, requires_grad=True)
targets = torch.randint(0, vocabulary, (tokens,))
def step():
    fused_linear_token_stats(hidden, weight, targets).logprob.sum().backward()
def clear():
    hidden.grad = weight.grad = None
step()
print(peak_growth(step, clear))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    """Logits of the larger case take 640 MB in float32."""
    peaks = []
    for tokens, vocabulary in ((2000, 20000), (8000, 20000)):
        command = [sys.executable, "-c", MEMORY, str(tokens), str(vocabulary), BENCHMARKS]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        peaks.append(float(ended.stdout.splitlines()[-1]))
    assert peaks[1] < 50.0
    assert peaks[1] < 2.0 * peaks[0] + 10.0

"""Observers against llm-compressor's, run by the Python that CALIBTRAIN_LLMCOMPRESSOR_PYTHON names."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibtrain.quantization.affine import Grid, scale_and_zero
from calibtrain.quantization.observers import LeastError, MinMax

PYTHON = "CALIBTRAIN_LLMCOMPRESSOR_PYTHON"
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with llm-compressor"),
]

THEIRS = """
import sys, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.observers import Observer
from safetensors.torch import load_file, save_file
batches = list(load_file(sys.argv[1]).values())
found = {}
for name, kind in {"minmax": "static_minmax", "mse": "memoryless_mse"}.items():
    for symmetric in (True, False):
        args = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=symmetric, dynamic=False, observer=kind,
                                observer_kwargs={"patience": 1000})
        observer = Observer.load_from_registry(kind, base_name="input", args=args)
        for batch in batches if name == "minmax" else [torch.cat(batches)]:
            observer(batch[None])
        ends = [observer.min_vals.flatten(), observer.max_vals.flatten()]  # before it forgets them
        qparams = observer.get_qparams()
        found[f"{name} {symmetric}"] = torch.cat(
            [*ends, qparams["scale"].flatten(), qparams["zero_point"].flatten().float()]).float()
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    generator = torch.Generator().manual_seed(5)
    batches = {str(i): torch.randn(40, 16, generator=generator).bfloat16().float() ** 3 + 0.5 for i in range(6)}
    batches = {name: one.bfloat16().float() for name, one in batches.items()}  # each number has a bin of its own
    save_file(batches, folder / "batches.safetensors")
    paths = [str(folder / "batches.safetensors"), str(folder / "found.safetensors")]
    subprocess.run([os.environ[PYTHON], "-c", THEIRS, *paths], check=True, timeout=120)
    return list(batches.values()), load_file(paths[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_ranges_and_scales_are_those_of_llm_compressor(peers, name, symmetric):
    batches, theirs = peers
    low, high, scale, zero = theirs[f"{name} {symmetric}"]
    grid = Grid(8, symmetric=symmetric)
    observer = MinMax("x") if name == "minmax" else LeastError("x", grid)
    for batch in reversed(batches):
        observer.update(batch)
    found = observer.range()
    torch.testing.assert_close(torch.stack(found), torch.stack([low, high]), rtol=1e-6, atol=0)
    ours = scale_and_zero(*found, grid)
    torch.testing.assert_close(ours[0], scale, rtol=1e-6, atol=0)
    assert ours[1] == zero

"""AWQ's scales equal llm-compressor's on the same tokens, where the algorithm is the same (duo_scaling=False)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.quantization import awq
from calibtrain.quantization.blocks import Text, find_blocks, first_inputs, matrices_in, observe
from calibtrain.quantization.folds import folds_of
from calibtrain.quantization.schemes import scheme_of
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.peer

PYTHON = "CALIBTRAIN_LLMCOMPRESSOR_PYTHON"
SCRIPT = Path(__file__).with_name("llmcompressor_scales.py")


@pytest.fixture
def recorded(monkeypatch):
    """Scales by source of their fold."""
    found = {}
    fold = awq.apply_fold

    def apply(block, one, scale):
        found[one.source] = scale
        fold(block, one, scale)

    monkeypatch.setattr(awq, "apply_fold", apply)
    return found


def uneven_model(path, kv_heads: int):
    """Channels and weights of unlike size, so that exponents differ in what they cost."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_model(path, hidden=64, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        size = torch.exp(0.8 * torch.randn(parameter.shape[-1], generator=generator))
        parameter.data *= size * (3 if parameter.ndim > 1 else 1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(path).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_scales_equal_llm_compressors(tmp_path, recorded, monkeypatch, kv_heads):
    """In float32: of a model in bfloat16 it compares outputs that are rounded to 8 bits, ours are not.

    Asymmetric: a symmetric group's largest negative weight lies on a tie, which the last bit of a mean decides.
    """
    if PYTHON not in os.environ:
        pytest.skip(f"{PYTHON} names no interpreter of an environment with llm-compressor")
    model = uneven_model(tmp_path, kv_heads)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (9, 14, 14, 20)]
    (tmp_path / "tokens.json").write_text(json.dumps(rows))
    arguments = [os.environ[PYTHON], SCRIPT, tmp_path, tmp_path / "tokens.json", tmp_path / "out.safetensors", "32"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "out.safetensors")

    monkeypatch.setattr(awq, "RATIOS", [step / 19 for step in range(20)])  # it includes 1
    batches = first_inputs(model, [Text(ids[:-2], ids[-2:]) for ids in rows], pad_id=2, size=4)
    scheme = scheme_of("w4a16", group_size=32, asymmetric=True)
    compared, moved = 0, 0
    for index, block in enumerate(find_blocks(model)[1]):
        recorded.clear()
        folds = [fold for fold in folds_of(model, block) if fold.heads is None]  # it leaves shared values out
        awq.awq_block(block, index, batches, folds, scheme, matrices_in(block))
        for source, scale in recorded.items():
            torch.testing.assert_close(scale, theirs[f"model.layers.{index}.{source}"], rtol=1e-2, atol=1e-3)
            compared, moved = compared + 1, moved + bool(scale.std() > 0.05)
        outputs = observe(block, index, batches, {}, lambda *_: None)
        batches = [batch.with_hidden(hidden) for batch, hidden in zip(batches, outputs, strict=True)]
    assert compared == len(theirs) == (6 if kv_heads == 2 else 8)
    assert moved >= 4

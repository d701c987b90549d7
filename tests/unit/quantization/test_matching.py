"""Where a layer writes into the residual stream is seen in the numbers; blocks are rounded towards the full ones."""

from __future__ import annotations

import copy

import pytest
import torch

from calibtrain.quantization.affine import quantize_weight
from calibtrain.quantization.blocks import Text, find_blocks, first_inputs, matrices_in, run_block
from calibtrain.quantization.matching import joins_of, match_block
from calibtrain.quantization.schemes import fit_groups, scheme_of
from tests.tiny import tiny_model
from tests.unit.quantization.test_folds import build

TEXTS = [Text([5, 6, 7, 8], [9, 10]), Text([11, 12], [13])]
LLAMA = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("name", "joins"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("gemma", LLAMA),
        ("gemma2", {}),  # a norm lies between
        ("phi3", LLAMA),
        ("gpt2", {"attn.c_proj": "", "mlp.c_proj": "ln_2"}),
        ("mixtral", {"self_attn.o_proj": ""}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_write_into_the_stream_are_found(name, joins, dtype):
    model = build(name, dtype)
    block = find_blocks(model)[1][1]
    batch = first_inputs(model, TEXTS, 0)[0]
    with torch.no_grad():
        assert joins_of(block, 1, batch, matrices_in(block)) == joins


@pytest.mark.parametrize("scheme", [scheme_of("w4a16", group_size=32), scheme_of("w8a16")], ids=lambda one: one.label)
def test_a_block_makes_up_for_what_the_ones_before_lack(scheme):
    model = tiny_model(hidden=64, layers=2, initializer_range=0.2)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 400, (n,), generator=generator).tolist()  # noqa: E731
    texts = [Text(draw(8), draw(4)) for _ in range(200)]
    batches = first_inputs(model, texts, 0)
    off = [one.with_hidden(one.hidden + 0.05 * one.hidden.roll(1, -1)) for one in batches]
    full = model.model.layers[1]
    scheme = fit_groups(scheme, {"": 64})
    weights = {name: [torch.ones(one.real.shape) for one in batches] for name in matrices_in(full)}

    def error(block):
        with torch.no_grad():
            pairs = [(run_block(block, 1, a), run_block(full, 1, b), b.real) for a, b in zip(off, batches, strict=True)]
        return sum(float((a - b)[real].square().sum()) for a, b, real in pairs)

    nearest = copy.deepcopy(full)
    with torch.no_grad():
        for one in matrices_in(nearest).values():
            one.weight.copy_(quantize_weight(one.weight, scheme.weights, scheme.group_size).dequantized())
    matched = copy.deepcopy(full)
    quantized, _ = match_block(matched, full, 1, off, batches, matrices_in(matched), scheme, weights)
    assert set(quantized) == set(matrices_in(full))
    assert error(matched) < 0.7 * error(nearest)
    if scheme.weights.bits == 8:  # rounding adds next to nothing, so that it is nearer than the full block itself
        assert error(matched) < 0.7 * error(full)

"""Blocks are found, and what a mixture of experts reads in rows is shown without its padding."""

from __future__ import annotations

import torch

from calibtrain.quantization.blocks import Text, find_blocks, first_inputs, observe
from tests.tiny import tiny_model
from tests.unit.quantization.test_folds import build


def test_blocks_are_found():
    name, blocks = find_blocks(tiny_model(layers=3))
    assert name == "model.layers"
    assert len(blocks) == 3


def test_a_mixture_that_reads_tokens_in_rows_sees_no_padding():
    model = build("qwen2_moe", torch.float32)
    block = model.model.layers[0]
    batches = first_inputs(model, [Text([3, 4], [5]), Text([3, 4, 6, 7], [5, 8])], pad_id=0)
    seen = {}
    layers = {"rows": block.mlp.shared_expert.down_proj, "placed": block.self_attn.o_proj}
    observe(block, 0, batches, layers, lambda name, x, batch: seen.update({name: x}))
    assert {name: len(x) for name, x in seen.items()} == {"rows": 9, "placed": 9}

"""SmoothQuant on tiny models: the authors' formula, real tokens only, and the same block afterwards."""

from __future__ import annotations

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.quantization.blocks import Text, find_blocks, first_inputs, observe, run_block
from calibtrain.quantization.folds import folds_of
from calibtrain.quantization.smoothquant import smooth_block, smoothing_scale
from tests.unit.quantization.test_folds import CONFIGS, build, rms

TEXTS = [Text([1, 5, 9, 7], [11, 2]), Text([1, 5, 9], [2]), Text([1, 30, 31, 32, 33], [44, 45, 2])]


def inputs_of(model, texts=TEXTS):
    return first_inputs(model, texts, pad_id=0, size=2)


def read_by(block, name, batches):
    seen = []
    observe(block, 0, batches, {name: block.get_submodule(name)}, lambda _, x, batch: seen.append(x))
    return torch.cat(seen)


def authors_scale(act, weights, alpha):
    """mit-han-lab's smooth_ln_fcs, in its words."""
    weight = torch.cat([w.abs().max(dim=0, keepdim=True)[0] for w in weights], dim=0).max(dim=0)[0].clamp(min=1e-5)
    return (act.pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scales_are_the_authors(alpha):
    model = build("llama", torch.float32)
    block, batches = find_blocks(model)[1][0], inputs_of(model)
    attention, mlp = block.self_attn, block.mlp
    expected = {}
    for norm, layers, reads in (
        ("input_layernorm", (attention.q_proj, attention.k_proj, attention.v_proj), "self_attn.q_proj"),
        ("post_attention_layernorm", (mlp.gate_proj, mlp.up_proj), "mlp.up_proj"),
    ):
        scale = authors_scale(read_by(block, reads, batches).abs().amax(0), [one.weight for one in layers], alpha)
        expected[norm] = getattr(block, norm).weight / scale
        expected[reads] = block.get_submodule(reads).weight * scale
    untouched = mlp.down_proj.weight.clone()
    smooth_block(block, 0, batches, folds_of(model, block), alpha)
    for name, value in expected.items():
        torch.testing.assert_close(block.get_submodule(name).weight, value, rtol=1e-5, atol=1e-6)
    assert torch.equal(mlp.down_proj.weight, untouched)  # not among the published folds


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoothed_block_computes_the_same(name):
    model = build(name, torch.float32)
    batches = inputs_of(model)
    for index, block in enumerate(find_blocks(model)[1]):
        before = [run_block(block, index, batch) for batch in batches]
        facts = smooth_block(block, index, batches, folds_of(model, block), further=True)
        after = [run_block(block, index, batch) for batch in batches]
        for batch, old, new in zip(batches, before, after, strict=True):
            assert rms((new - old)[batch.real]) < 1e-4 * rms(old[batch.real])
        assert set(facts) >= {fold.source for fold in folds_of(model, block) if fold.published}
        batches = [batch.with_hidden(hidden) for batch, hidden in zip(batches, after, strict=True)]


def test_outliers_of_activations_shrink():
    model = build("qwen2", torch.float32)
    block, batches = find_blocks(model)[1][0], inputs_of(model)
    block.input_layernorm.weight.data[3] = 80.0
    ratio = lambda x: (x.abs().amax(0).max() / x.abs().amax(0).median()).item()  # noqa: E731
    before = ratio(read_by(block, "self_attn.q_proj", batches))
    smooth_block(block, 0, batches, folds_of(model, block))
    assert ratio(read_by(block, "self_attn.q_proj", batches)) < before / 4


def test_padding_is_not_observed():
    """The same scales from texts side by side, padded, as from each alone."""
    found = []
    for size in (1, 3):
        model = build("gemma2", torch.float32)
        block = find_blocks(model)[1][0]
        model.model.embed_tokens.weight.data[0] = 1000.0
        batches = first_inputs(model, TEXTS, pad_id=0, size=size)
        found.append(smooth_block(block, 0, batches, folds_of(model, block), further=True))
    for source, limits in found[0].items():
        assert found[1][source] == pytest.approx(limits, rel=1e-4)


def test_zero_channels_keep_a_scale_of_one():
    x, w = torch.tensor([0.0, 4.0, 9.0]), torch.tensor([2.0, 1.0, 0.0])
    assert smoothing_scale(x, w, 0.5).tolist() == [1.0, 2.0, 1.0]
    model = build("llama", torch.float32)
    block, batches = find_blocks(model)[1][0], inputs_of(model)
    block.input_layernorm.weight.data[:] = 0  # constant inputs: all zero
    smooth_block(block, 0, batches, folds_of(model, block))
    assert all(torch.isfinite(parameter).all() for parameter in block.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(value):
    model = build("llama", torch.float32)
    block, batches = find_blocks(model)[1][1], inputs_of(model)
    weight = block.post_attention_layernorm.weight.data
    weight[5] = value
    with pytest.raises(UserError, match=r"block 1, mlp.gate_proj: .* overflows in its dtype \(float32\)"):
        smooth_block(block, 1, batches, folds_of(model, block))


def test_nothing_to_fold_leaves_a_block_as_it_is():
    model = build("llama", torch.float32)
    block, batches = find_blocks(model)[1][0], inputs_of(model)
    assert smooth_block(block, 0, batches, []) == {}

"""AWQ on tiny models with several groups: the published search and clip, real tokens only, the same block afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.quantization import awq
from calibtrain.quantization.affine import quantize_tokens, quantize_weight
from calibtrain.quantization.awq import awq_block, clipped_range, scale_of
from calibtrain.quantization.blocks import Text, find_blocks, first_inputs, matrices_in, matrix_of, run_block
from calibtrain.quantization.folds import folds_of, shared_by_heads
from calibtrain.quantization.schemes import scheme_of
from tests.tiny import tiny_model
from tests.unit.quantization.test_folds import CONFIGS, build, rms
from tests.unit.quantization.test_smoothquant import read_by

W4 = scheme_of("w4a16", group_size=32)
SMALL = replace(W4, group_size=8)  # several groups in the models of the fold table
W8A8 = scheme_of("w8a8")


def texts(count=12, vocabulary=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count, 2), generator=generator).tolist()
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    return [Text(draw(prompt), draw(answer)) for prompt, answer in lengths]


def uneven(dtype=torch.float32, **overrides):
    """A Llama of two blocks whose channels differ in size, as trained ones do; 64 inputs, 128 within the MLP."""
    model = tiny_model(vocab_size=97, hidden=64, **overrides)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        size = torch.exp(0.8 * torch.randn(parameter.shape[-1], generator=generator))
        parameter.data *= size * (3 if parameter.ndim > 1 else 1)
    return model.to(dtype)


def prepared(model, count=12, size=5):
    return first_inputs(model, texts(count), pad_id=2, size=size)


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


def published_scale(block, index, fold, batches, scheme):
    """The search in the authors' words: a copy of the block for each exponent, Q(W s) / s in its weights."""
    # The largest negative weight of a group lies on a tie (-7.5 steps): the last bit of a mean decides where it goes.
    read = [read_by(block, fold.targets[0], [batch]) for batch in batches]
    mean = shared_by_heads(fold, sum(x.abs().sum(0) for x in read) / sum(map(len, read)), "mean")
    outputs = lambda one: part_outputs(one, index, fold.part, batches)  # noqa: E731
    expected, best, least = outputs(block), None, float("inf")
    for step in range(20):
        scale = mean.pow(step / 20).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        tried = copy.deepcopy(block)
        for name in fold.targets:
            module = tried.get_submodule(name)
            module.weight.data *= scale
            module.weight.data = quantize_weight(module.weight, scheme.weights, scheme.group_size).dequantized() / scale
            if scheme.activations is not None:
                module.register_forward_pre_hook(
                    lambda _, args, s=scale: (s * quantize_tokens(args[0] / s, W8A8.activations),)
                )
        error = (outputs(tried) - expected).pow(2).mean().item()
        if error < least:
            best, least = scale, error
    return best


@torch.no_grad()
def part_outputs(block, index, part, batches):
    """What a part gives at real tokens."""
    found = []
    for batch in batches:
        take = lambda _, args, out, real=batch.real: found.append((out[0] if isinstance(out, tuple) else out)[real])  # noqa: E731
        handle = block.get_submodule(part).register_forward_hook(take)
        run_block(block, index, batch)
        handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(
    "scheme", [W4, scheme_of("w4a16", group_size=64, asymmetric=True), W8A8], ids=lambda s: s.label
)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_search_is_the_published_one(scheme, kv_heads, recorded):
    model = uneven(num_key_value_heads=kv_heads)
    batches = prepared(model)
    block = find_blocks(model)[1][0]
    folds = folds_of(model, block)
    expected = {fold.source: published_scale(block, 0, fold, batches, scheme) for fold in folds}
    awq_block(block, 0, batches, folds, scheme, matrices_in(block))
    assert list(recorded) == list(expected)
    for source, scale in expected.items():
        torch.testing.assert_close(recorded[source], scale, rtol=1e-4, atol=1e-5)
    assert sum(scale.std() > 0.05 for scale in recorded.values()) >= 2  # not all of exponent 0


def published_clip(weight, x, scheme):
    """auto_clip_layer in the authors' words, with this package's grid: the largest absolute weight kept, (out, groups)."""
    w = weight.reshape(len(weight), 1, -1, scheme.group_size)
    x = x.reshape(1, len(x), -1, scheme.group_size)
    top = w.abs().amax(dim=-1, keepdim=True)
    best, errors = top.clone(), torch.ones_like(top) * 1e9
    expected = (x * w).sum(dim=-1)
    for step in range(10):
        limit = top * (1 - step / 20)
        clamped = torch.clamp(w, -limit, limit)
        q = quantize_weight(clamped.reshape(weight.shape), scheme.weights, scheme.group_size).dequantized()
        error = ((x * q.reshape(w.shape)).sum(dim=-1) - expected).pow(2).mean(dim=1).view(errors.shape)
        better = error < errors
        errors[better], best[better] = error[better], limit[better]
    return best[:, 0, :, 0]


@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_clip_is_the_published_one(asymmetric, tokens):
    scheme = scheme_of("w4a16", group_size=32, asymmetric=asymmetric)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 96, generator=generator) ** 3, torch.randn(tokens, 96, generator=generator)
    low, high = clipped_range(weight, x, scheme)
    kept = published_clip(weight, x, scheme)
    parts = weight.view(48, 3, 32)
    agree = torch.isclose(torch.maximum(-low, high), torch.minimum(parts.abs().amax(-1), kept), rtol=1e-5)
    assert agree.float().mean() > 0.95  # of near equals, rounding decides
    assert (low >= parts.amin(-1)).all()
    assert (high <= parts.amax(-1)).all()
    assert (torch.maximum(-low, high) < parts.abs().amax(-1)).float().mean() > 0.3

    def error(q):
        return ((q.dequantized() - weight) @ x.T).square().sum()

    assert error(quantize_weight(weight, scheme.weights, 32, low, high)) < error(
        quantize_weight(weight, scheme.weights, 32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "qwen2_moe"])
def test_a_searched_block_computes_the_same(name, dtype):
    model = build(name, dtype)
    batches = first_inputs(model, texts(), pad_id=0, size=5)
    for index, block in enumerate(find_blocks(model)[1][:2]):
        with torch.no_grad():
            before = [run_block(block, index, batch).float() for batch in batches]
            layers = matrices_in(block, f"model.layers.{index}.")
            kept = dict(block.named_parameters())
            ranges = awq_block(block, index, batches, folds_of(model, block), SMALL, layers)
            after = [run_block(block, index, batch) for batch in batches]
        assert all(parameter is kept[key] and parameter.dtype == dtype for key, parameter in block.named_parameters())
        tolerance = 1e-4 if dtype == torch.float32 else 6e-2 if "moe" in name else 2e-2  # a router may turn
        for batch, old, new in zip(batches, before, after, strict=True):
            assert rms((new.float() - old)[batch.real]) < tolerance * rms(old[batch.real])
        skipped = {"q_proj", "k_proj", "qkv_proj", "c_attn"}
        assert set(ranges) == {full for full in layers if full.rpartition(".")[2] not in skipped}
        for full, (low, high) in ranges.items():
            out, inputs = matrix_of(layers[full]).shape
            assert low.shape == high.shape == (out, inputs // 8)
        batches = [batch.with_hidden(hidden) for batch, hidden in zip(batches, after, strict=True)]


def quantized_error(scheme, method, dtype=torch.float32):
    """Error of the outputs of two quantised blocks at real tokens, relative to what they add."""
    model, batches = uneven(dtype), None
    batches = prepared(model, count=40, size=16)
    exact = batches
    for index, block in enumerate(find_blocks(model)[1]):
        layers = matrices_in(block)
        with torch.no_grad():
            exact = [batch.with_hidden(run_block(block, index, batch)) for batch in exact]
            ranges = awq_block(block, index, batches, folds_of(model, block), scheme, layers) if "awq" in method else {}
            for name, module in layers.items():
                ends = ranges.get(name, (None, None)) if "clip" in method else (None, None)
                taken = quantize_weight(matrix_of(module), scheme.weights, scheme.group_size, *ends).dequantized()
                module.weight.copy_(taken)
                if scheme.activations is not None:
                    module.register_forward_pre_hook(lambda _, args: (quantize_tokens(args[0], scheme.activations),))
            batches = [batch.with_hidden(run_block(block, index, batch)) for batch in batches]
    off = torch.cat([(a.hidden - b.hidden).float()[a.real] for a, b in zip(batches, exact, strict=True)])
    return rms(off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_searched_model_errs_less_than_min_max(dtype):
    plain = quantized_error(W4, "minmax", dtype)
    scaled = quantized_error(W4, "awq", dtype)
    clipped = quantized_error(W4, "awq and clip", dtype)
    assert scaled < 0.9 * plain
    assert clipped < scaled
    assert quantized_error(W8A8, "awq", torch.float32) < 0.9 * quantized_error(W8A8, "minmax", torch.float32)


def test_padding_is_not_seen(recorded):
    """The same scales and ranges from texts side by side, padded, as from each alone."""
    found = []
    for size in (1, 12):
        model = uneven()
        model.model.embed_tokens.weight.data[2] = 50.0
        block, batches = find_blocks(model)[1][0], prepared(model, size=size)
        scheme = replace(W4, weights=replace(W4.weights, symmetric=False))  # free of ties
        ranges = awq_block(block, 0, batches, folds_of(model, block), scheme, matrices_in(block))
        found.append((dict(recorded), ranges))
    for source, scale in found[0][0].items():
        torch.testing.assert_close(found[1][0][source], scale, rtol=1e-4, atol=1e-5)
    same = [torch.isclose(found[1][1][name][1], high).float().mean() for name, (_, high) in found[0][1].items()]
    assert min(same) > 0.97


def test_only_some_rows_are_run_and_they_suffice(recorded, monkeypatch):
    found, sizes = [], []
    run = awq._run
    monkeypatch.setattr(awq, "_run", lambda part, call: sizes.append(len(call.real)) or run(part, call))
    for budget, rows in ((2048, 16), (150, 4), (150, 16)):
        sizes.clear()
        monkeypatch.setattr(awq, "SEARCH_TOKENS", budget)
        monkeypatch.setattr(awq, "SEARCH_ROWS", rows)
        model = uneven()
        block, batches = find_blocks(model)[1][0], prepared(model, count=60)
        awq_block(block, 0, batches, folds_of(model, block), W4, matrices_in(block))
        found.append((sum(sizes) / 21 / 4, dict(recorded)))
    assert found[0][0] == 60
    assert found[1][0] == pytest.approx(60 / 5, abs=1)
    assert found[2][0] == 20  # long texts: few tokens would be of fewer texts still
    scales = [one for _, one in found]
    for source, scale in scales[0].items():  # the means are of all tokens, the exponent of a fifth
        assert torch.corrcoef(torch.stack([scale.log(), scales[1][source].log()]))[0, 1] > 0.99 or scale.std() < 0.05


def test_zero_and_constant_channels_keep_a_scale_of_one():
    mean = torch.tensor([0.0, 0.5, 8.0, 0.0])
    scale = scale_of(mean, 0.5)
    assert scale[0] == scale[3] == 1
    assert (scale[1] * scale[2]).item() == pytest.approx(1)
    assert torch.equal(scale_of(torch.zeros(4), 0.5), torch.ones(4))
    assert torch.equal(scale_of(torch.full((4,), 3.0), 0.7), torch.ones(4))
    model = uneven()
    block, batches = find_blocks(model)[1][0], prepared(model)
    block.input_layernorm.weight.data[:] = 0  # q, k, v read zeros, o too
    block.post_attention_layernorm.weight.data[::2] = 0
    ranges = awq_block(block, 0, batches, folds_of(model, block), W4, matrices_in(block))
    numbers = [*block.parameters(), *(end for pair in ranges.values() for end in pair)]
    assert all(torch.isfinite(one).all() for one in numbers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(value):
    model = uneven()
    block, batches = find_blocks(model)[1][1], prepared(model)
    block.mlp.up_proj.weight.data[5, 7] = value
    before = {key: parameter.clone() for key, parameter in block.named_parameters()}
    with pytest.raises(UserError, match=r"block 1, mlp.down_proj: .* broken or overflows in its dtype"):
        awq_block(block, 1, batches, folds_of(model, block), W4, matrices_in(block))
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(parameter, before[key], rtol=0, atol=0, equal_nan=True)


def test_without_folds_only_ranges_are_searched():
    model = uneven()
    block, batches = find_blocks(model)[1][0], prepared(model)
    before = {key: parameter.clone() for key, parameter in block.named_parameters()}
    ranges = awq_block(block, 0, batches, [], W4, matrices_in(block, "x."))
    assert set(ranges) == {f"x.{name}" for name in matrices_in(block) if name[10:] not in ("q_proj", "k_proj")}
    assert all(torch.equal(parameter, before[key]) for key, parameter in block.named_parameters())


def test_layers_that_stay_in_full_precision_only_follow(recorded):
    """up_proj stays: gate_proj alone decides the scale, both take it; what only feeds kept layers is not folded."""
    model = uneven()
    block, batches = find_blocks(model)[1][0], prepared(model)
    with torch.no_grad():
        before = [run_block(block, 0, batch) for batch in batches]
    up = block.mlp.up_proj.weight.clone()
    layers = {name: one for name, one in matrices_in(block).items() if not name.endswith(("up_proj", "down_proj"))}
    ranges = awq_block(block, 0, batches, folds_of(model, block), W4, layers)
    assert "mlp.up_proj" not in recorded
    torch.testing.assert_close(block.mlp.up_proj.weight, up * recorded["post_attention_layernorm"])
    assert "mlp.up_proj" not in ranges
    with torch.no_grad():
        for batch, old in zip(batches, before, strict=True):
            assert rms((run_block(block, 0, batch) - old)[batch.real]) < 1e-4 * rms(old[batch.real])


def test_static_activations_are_searched_on_one_range():
    model = uneven()
    block, batches = find_blocks(model)[1][0], prepared(model)
    scheme = scheme_of("w8a8", static=True)
    assert awq_block(block, 0, batches, folds_of(model, block), scheme, matrices_in(block))


def test_every_architecture_of_the_table_can_be_searched():
    for name in CONFIGS:
        model = build(name, torch.float32)
        block = find_blocks(model)[1][-1]
        batches = first_inputs(model, texts(4), pad_id=0, size=2)
        index = len(find_blocks(model)[1]) - 1
        assert awq_block(block, index, batches, folds_of(model, block), SMALL, matrices_in(block))


def test_queries_and_keys_are_known_by_the_names_of_other_architectures():
    assert awq._of_queries_and_keys("self_attention.query_key_value")
    assert not awq._of_queries_and_keys("mlp.dense_h_to_4h")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_finds_the_same_scales(recorded):
    found = []
    for device in ("cpu", "cuda"):
        model = uneven().to(device)
        block, batches = find_blocks(model)[1][0], prepared(model)
        scheme = scheme_of("w4a16", group_size=32, asymmetric=True)
        ranges = awq_block(block, 0, batches, folds_of(model, block), scheme, matrices_in(block))
        assert {end.device.type for pair in ranges.values() for end in pair} == {device}
        found.append({source: scale.cpu() for source, scale in recorded.items()})
    for source, scale in found[0].items():
        torch.testing.assert_close(found[1][source], scale, rtol=1e-3, atol=1e-4)

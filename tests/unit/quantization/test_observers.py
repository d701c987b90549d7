"""Observers: exact ranges, percentiles within their stated bound, and the same bits in whatever order tokens come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.quantization.affine import Grid, from_grid, scale_and_zero, to_grid
from calibtrain.quantization.blocks import Inputs, matrices_in
from calibtrain.quantization.observers import (
    LeastError,
    MinMax,
    Percentile,
    first_token_outliers,
    static_input_scales,
)
from calibtrain.quantization.schemes import scheme_of
from tests.tiny import tiny_model

MAKE = {
    "minmax": lambda channels: MinMax("layer", channels),
    "percentile": lambda channels: Percentile("layer", channels, p=99.0),
    "mse": lambda channels: LeastError("layer", Grid(8), channels),
}


def tokens(dtype=torch.float32, n=3000, channels=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, channels, generator=generator) ** 3 * torch.logspace(-3, 2, channels)
    return (x + 0.1).to(dtype)


def seen(make, channels, parts):
    observer = make(channels)
    for part in parts:
        observer.update(part)
    return observer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("kind", MAKE)
def test_any_order_and_partition_gives_the_same_bits(kind, channels, dtype):
    make, x = MAKE[kind], tokens(dtype)
    whole = seen(make, channels, [x]).range()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for cuts in ([1, 2, 700], [1500], [2999], [0, 3000]):
        parts = torch.tensor_split(x[order], cuts)
        observers = [seen(make, channels, [part]) for part in parts]
        for merged in (observers, observers[::-1]):
            total = make(channels)
            for one in merged:
                total.merge(one)
            assert all(torch.equal(a, b) for a, b in zip(total.range(), whole, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(seen(make, channels, parts).range(), whole, strict=True))


@pytest.mark.parametrize("channels", [None, 6])
def test_minmax_is_exact(channels):
    x = tokens(torch.bfloat16)
    low, high = seen(MAKE["minmax"], channels, x.split(100)).range()
    dims = (0, 1) if channels is None else (0,)
    assert torch.equal(low, x.float().amin(dims))
    assert torch.equal(high, x.float().amax(dims))


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize(("dtype", "channels", "bound"), [
    (torch.float32, None, 2**-7), (torch.bfloat16, None, 0.0), (torch.float32, 6, 2**-4), (torch.bfloat16, 6, 2**-4),
])  # fmt: skip
def test_percentiles_are_within_their_bound(dtype, channels, bound, p):
    x = tokens(dtype)
    low, high = seen(lambda c: Percentile("layer", c, p=p), channels, x.split(500)).range()
    axis = None if channels is None else 0
    for found, exact in (
        (high, np.percentile(x.float().numpy(), p, axis=axis, method="inverted_cdf")),
        (-low, np.percentile(-x.float().numpy(), p, axis=axis, method="inverted_cdf")),
    ):
        exact = torch.tensor(exact)
        assert ((exact - found).abs() <= bound * exact.abs()).all()
        assert (found.abs() <= exact.abs()).all()  # nearer to 0, as stated


def test_percentile_of_all_is_the_range_to_a_bin():
    x = tokens(torch.bfloat16)
    found = seen(lambda c: Percentile("layer", c, p=100.0), None, [x]).range()
    assert torch.equal(torch.stack(found), torch.stack([x.amin(), x.amax()]).float())


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, symmetric=False), Grid(8, floating=True)])
def test_mse_finds_the_best_shrink_of_all_that_are_tried(grid):
    x = tokens(torch.bfloat16)  # each number has a bin of its own, so that the sum over tokens is the histogram's
    low, high = seen(lambda c: LeastError("layer", grid, c), None, x.split(700)).range()

    def error(shrink):
        scale, zero = scale_and_zero(x.float().amin() * shrink, x.float().amax() * shrink, grid)
        y = from_grid(to_grid(x.float(), scale, zero, grid), scale, zero)
        return ((y - x.float()).abs().double() ** 2.4).sum().item()

    tried = [1 - i / 100 for i in range(21)]
    best = min(tried, key=error)
    assert high.item() == pytest.approx(x.amax().item() * best, rel=1e-6)
    assert low.item() == pytest.approx(x.amin().item() * best, rel=1e-6)
    if grid.bits == 4:
        assert best < 1  # heavy tails: else the test would show nothing


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_number_names_the_layer(kind, bad):
    x = tokens(n=10)
    x[3, 2] = bad
    with pytest.raises(UserError, match=r"^layer: reads NaN or infinity"):
        MAKE[kind](None).update(x)


def test_no_token_and_constant_tokens():
    observer = MinMax("experts.3")
    observer.update(torch.zeros(0, 4))
    with pytest.raises(UserError, match=r"^experts\.3: no token reached it"):
        observer.range()
    for make in MAKE.values():
        constant = seen(make, None, [torch.full((5, 3), 2.0)])
        assert constant.range()[0].item() <= 2.0 == constant.range()[1].item() or make is MAKE["mse"]
        scale, _ = scale_and_zero(*constant.range(), Grid(8))
        assert scale > 0


def inputs_of(model, outlier=1.0):
    """Two right-padded sequences; the first token of each is `outlier` times as large as the others."""
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    hidden[:, 0] *= outlier
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    hidden[~real] = 1e6  # padding, which must not be seen
    places = torch.arange(6)[None].expand(2, 6)
    rotary = model.model.rotary_emb(hidden, places)
    arguments = [{"position_embeddings": rotary, "attention_mask": None, "position_ids": places}] * 2
    return [Inputs(hidden, arguments, real, real)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_static_scales_of_a_block(dtype, observer):
    model = tiny_model().to(dtype)
    block, layers = model.model.layers[0], matrices_in(model.model.layers[0], "model.layers.0.")
    scheme = scheme_of("w8a8", static=True, observer=observer)
    scales = static_input_scales(block, 0, inputs_of(model), layers, scheme)
    assert scales.keys() == layers.keys()
    assert all(scale.shape == (1,) and scale.dtype == dtype for scale in scales.values())
    q, k, v = (scales[f"model.layers.0.self_attn.{one}_proj"] for one in "qkv")
    assert q == k == v  # one input, one scale: engines fuse the three
    if observer == "minmax":
        states = block.input_layernorm(inputs_of(model)[0].hidden)[inputs_of(model)[0].real]
        assert torch.equal(q, (states.float().abs().max() / 127.5).to(dtype)[None])


def test_massive_first_tokens_are_told():
    model = tiny_model()
    block = model.model.layers[0]
    layers = {"block": block.input_layernorm}
    found = first_token_outliers(block, 0, inputs_of(model, outlier=1000.0), layers)["block"]
    hidden, real = inputs_of(model, 1000.0)[0].hidden, inputs_of(model)[0].real
    real[:, 0] = False
    assert found.largest == hidden[:, 0].abs().max()
    assert found.largest_of_others == hidden[real].abs().max()
    assert found.times == pytest.approx(found.largest / hidden[real].abs().amax(-1).median().item())
    assert first_token_outliers(block, 0, inputs_of(model), layers) == {}

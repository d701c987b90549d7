"""Readings of matrices against where the run began: which, how exactly, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calibtrain.config import RunConfig
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses.rotation_probes import Shard, run_together
from calibtrain.spectral import drift
from calibtrain.spectral.polar import polar_factor
from calibtrain.training.matrices import trained_layers
from calibtrain.training.spectra import BLOCK, _top, build_spectra, power_iteration, spectra_layers
from tests.tiny import tiny_model

ONE = World(0, 1, 0, torch.device("cpu"))


def config(**tracking):
    return RunConfig.model_validate({"objective": {"name": "sft"}, "tracking": {"spectra_every": 1, **tracking}})


def readings(model, **tracking):
    """Of one process, with weights whole."""
    module = SimpleNamespace(policy=SimpleNamespace(causal_model=model))
    return build_spectra(config(**tracking), SimpleNamespace(stage=0, module=module), ONE)


def chosen(names, wanted):
    return [name for name, _ in spectra_layers([(name, nn.Linear(2, 2)) for name in names], wanted)]


def test_modules_are_chosen_by_parts_of_their_names_and_by_default_in_three_blocks():
    names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert {name.split(".")[2] for name in chosen(names, "first-middle-last")} == {"0", "6", "11"}
    assert len(chosen(names, "first-middle-last")) == 6
    assert chosen(names, "all-linear") == names
    assert len(chosen(names, ["q_proj"])) == 12
    assert chosen(names, ["layers.1", "layers.3.mlp.down_proj"]) == [names[2], names[3], names[7]]
    assert chosen(["transformer.out", "h.3.w1", "h.7.w1"], "first-middle-last") == ["h.3.w1", "h.7.w1"]
    assert chosen(["out", "gate"], "first-middle-last") == ["out", "gate"]


@pytest.mark.parametrize(
    ("names", "wanted", "words"),
    [
        (
            ["model.layers.0.q_proj"],
            ["q_proj", "q_pro"],
            "called or lies in q_pro; there are q_proj, as in model.layers.0",
        ),
        (["model.layers.0.q_proj"], ["layers.1"], "lies in layers.1; there are q_proj"),
        ([], "first-middle-last", "spectra_every: the run trains no linear layer"),
    ],
)
def test_modules_that_are_not_there(names, wanted, words):
    with pytest.raises(UserError, match=words):
        chosen(names, wanted)


def test_a_matrix_that_is_zero_is_refused_by_name():
    model = tiny_model()
    nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    with pytest.raises(UserError, match=r"spectra_modules: model.layers.1.self_attn.v_proj is 0 everywhere"):
        readings(model)


def test_off_by_default_and_then_nothing_is_built():
    assert RunConfig().tracking.spectra_every == 0
    assert build_spectra(RunConfig(), None, None) is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"tracking": {"spectra_every": -1}}, "greater than or equal to 0"),
        ({"tracking": {"spectra_every": 1, "spectra_modules": []}}, "at least 1 item"),
        ({"tracking": {"spectra_every": 1}, "model": {"adapter": {"kind": "oft"}}}, "not model.adapter"),
    ],
)
def test_settings_that_cannot_be(sections, words):
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate(sections)


def test_due_every_so_many_steps_and_after_the_last():
    spectra = readings(tiny_model(), spectra_every=4, spectra_modules=["q_proj"])
    assert [step for step in range(1, 11) if spectra.is_due(step, 10)] == [4, 8, 10]


def test_a_scale_is_read_as_a_scale_and_matrices_by_the_penalties_own_formulas():
    torch.manual_seed(0)
    model = tiny_model(hidden=16, num_attention_heads=2)  # so small that the penalties are exact
    spectra = readings(model, spectra_modules=["layers.0.self_attn"])
    layers = dict(trained_layers(model))
    start = {one.name: layers[one.name].weight.detach().clone() for one in spectra.matrices}
    state = torch.get_rng_state()
    with torch.no_grad():
        layers["model.layers.0.self_attn.q_proj"].weight.mul_(1.25)
        layers["model.layers.0.self_attn.o_proj"].weight.add_(0.002)
    read = spectra.read()
    assert torch.equal(state, torch.get_rng_state())
    scaled = read["model.layers.0.self_attn.q_proj"]
    assert scaled["alpha"] == pytest.approx(1.25, rel=1e-6)
    assert scaled["spectral_norm_ratio"] == pytest.approx(1.25, rel=1e-6)
    assert scaled["relative_drift"] == pytest.approx(0.25, rel=1e-6)
    assert scaled["polar_drift"] == pytest.approx(0, abs=1e-12)
    unmoved = read["model.layers.0.self_attn.k_proj"]
    assert unmoved["relative_drift"] == 0
    assert unmoved["alpha"] == 1
    name = "model.layers.0.self_attn.o_proj"
    w0, w = start[name].double(), layers[name].weight.detach().double()
    expected = {
        key: float(getattr(drift, key)(w, w0))
        for key in ("row_gram_drift", "column_gram_drift", "row_stretch", "column_stretch")
    }
    expected["polar_drift"] = float(drift.polar_drift(w, polar_factor(w0), w0.square().sum()))
    assert {key: read[name][key] for key in expected} == pytest.approx(expected, rel=1e-5)


def spiked(rows=96, columns=64, size=1.2):
    """A matrix, and itself with a direction on top that its own largest ones know nothing of."""
    left, right = (torch.linalg.qr(torch.randn(n, 40)).Q for n in (rows, columns))
    values = torch.linspace(1.0, 0.5, 39)
    plain = (left[:, :39] * values) @ right[:, :39].mT
    return plain, plain + size * torch.outer(left[:, 39], right[:, 39])


@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_is_found_where_nothing_points_to_it(turned):
    torch.manual_seed(2)
    plain, moved = (one.mT.contiguous() if turned else one for one in spiked())
    norm, block = _top(plain, "name")
    assert norm == pytest.approx(1.0, rel=1e-4)
    nothing = [plain.new_zeros(size, 0) for size in plain.shape]
    ((found, _),) = run_together([power_iteration(Shard.whole(moved), block, *nothing)])
    assert found == pytest.approx(1.2, rel=5e-3)
    # The same as an update of rank one, which the shards do not hold.
    left, values, right = torch.linalg.svd(moved - plain)
    factors = left[:, :1] * values[0], right[:1].mT
    ((found, _),) = run_together([power_iteration(Shard.whole(plain), block, *factors)])
    assert found == pytest.approx(1.2, rel=5e-3)


def test_narrow_matrices_and_ones_that_are_not_finite():
    torch.manual_seed(3)
    for shape in ((5, 1), (1, 5), (3, 40)):
        matrix = torch.randn(shape)
        norm, block = _top(matrix, "name")
        assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
        assert block.shape == (shape[1], min(BLOCK, shape[1]))
        nothing = [matrix.new_zeros(size, 0) for size in shape]
        broken = matrix.clone()
        broken[0, 0] = math.nan
        ((found, _),) = run_together([power_iteration(Shard.whole(broken), block, *nothing)])
        assert math.isnan(found)

"""Adapters that can only rotate: they start at the base model, stay in their set, and merge into plain weights."""

import pytest
import torch
from torch import nn

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.losses.rotation import polar_drift, row_gram_drift
from calibtrain.models.arithmetic import DTYPES
from calibtrain.models.export import export_model
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.policy import Policy
from calibtrain.spectral.polar import polar_factor
from calibtrain.spectral.shared_rotation import SharedRotationLinear, add_shared_rotations, merge_shared_rotations
from tests.tiny import tiny_model, write_tiny_model

SHAPES = [(12, 7), (7, 12), (9, 9)]


def layer(shape, rank, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    return SharedRotationLinear(base, rank), base.weight.detach().clone()


def stir(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 7])
def test_shared_rotation_reaches_exactly_what_it_is_named_for(shape, rank):
    """W = U0 Q (a S0) Q^T V0^T: no polar drift, all singular values times a, and both bases turned by the same Q."""
    adapted, w0 = layer(shape, rank)
    assert torch.equal(adapted.merged_weight(), w0)
    stir(adapted)
    weight, scale = adapted.merged_weight().detach(), float(adapted.log_scale.detach().exp())
    assert float((weight - scale * w0).norm() / w0.norm()) > 0.01
    assert float(polar_drift(weight, polar_factor(w0), w0.square().sum())) < 1e-20
    assert torch.allclose(torch.linalg.svdvals(weight), scale * torch.linalg.svdvals(w0))
    q = adapted.rotation().detach()
    assert torch.allclose(q @ q.mT, torch.eye(rank, dtype=q.dtype))
    assert torch.linalg.det(q) > 0
    left, s, right = torch.linalg.svd(w0, full_matrices=False)
    turn = torch.block_diag(q, torch.eye(s.shape[0] - rank, dtype=q.dtype))
    signs = torch.sign((left[:, :rank] * adapted.left).sum(0))
    turn[:rank, :rank] = signs[:, None] * q * signs
    expected = scale * left @ turn @ torch.diag(s) @ turn.mT @ right
    assert torch.allclose(weight, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_that_of_the_merged_layer_with_its_gradients(bias):
    adapted, _ = layer((7, 12), 4, bias)
    stir(adapted)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = nn.functional.linear(x, adapted.merged_weight(), adapted.base.bias)
    assert torch.allclose(adapted(x), expected, atol=1e-6)  # the scale of the output is float32
    names = {name for name, one in adapted.named_parameters() if one.requires_grad}
    assert names == {"skew", "log_scale"}
    one, two = (
        torch.autograd.grad(output.square().sum(), (adapted.skew, adapted.log_scale))
        for output in (adapted(x), expected)
    )
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, two, strict=True))


def test_adding_and_merging_covers_every_linear_layer_but_the_head():
    model, plain = tiny_model(), tiny_model()
    ids = torch.arange(5, 15)[None]
    add_shared_rotations(model, 8, "all-linear")
    adapted = [name for name, one in model.named_modules() if isinstance(one, SharedRotationLinear)]
    assert len(adapted) == 2 * 7
    assert "lm_head" not in adapted
    assert torch.allclose(model(ids).logits, plain(ids).logits)
    stir(model)
    before = model(ids).logits
    assert not torch.allclose(before, plain(ids).logits, atol=1e-3)
    merge_shared_rotations(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_unknown_layers_are_refused():
    with pytest.raises(UserError, match=r"model\.adapter\.target_modules"):
        add_shared_rotations(tiny_model(), 4, ["nowhere"])


ADAPTERS = {
    "shared_rotation": {"kind": "shared_rotation", "rank": 6},
    "oft": {"kind": "oft", "block_size": 8},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_is_a_plain_model_that_answers_like_the_adapted_one(kind, dtype, tmp_path):
    """The adapter is gone from the directory; OFT's weights are W0 R, the shared rotation's have no polar drift."""
    if kind == "oft":
        pytest.importorskip("peft", reason="OFT is PEFT's")
    from transformers import AutoModelForCausalLM

    config = ModelConfig.model_validate(
        {"source": str(write_tiny_model(tmp_path / "tiny")), "dtype": dtype, "adapter": ADAPTERS[kind]}
    )
    policy = Policy(load_model(config).eval())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    export_model(policy, config, load_tokenizer(config), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in start.named_parameters()}
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        adapted = policy.causal_model(ids).logits.float()
        error = float((found(ids).logits - adapted).norm() / adapted.norm())
        moved = float((start(ids).logits - adapted).norm() / adapted.norm())
    assert error < (1e-4 if dtype == "fp32" else 0.03)
    assert moved > 4 * error
    weights = dict(start.named_parameters())
    for name, weight in found.named_parameters():
        w0, weight = weights[name].detach().to(DTYPES[dtype]).double(), weight.detach().double()
        if name.endswith("_proj.weight"):
            assert float((weight - w0).norm() / w0.norm()) > 0.01
            if kind == "oft":
                broken = row_gram_drift(weight, w0)
            else:
                broken = polar_drift(weight, polar_factor(w0), w0.square().sum())
            assert float(broken) < (1e-10 if dtype == "fp32" else 1e-3)
        else:
            assert torch.equal(weight, w0)


@pytest.mark.peer
def test_peft_oft_keeps_the_gram_matrix_of_the_rows():
    """PEFT's exact Cayley form is orthogonal to rounding; its series, which we do not use, is not and turns back."""
    peft = pytest.importorskip("peft", reason="OFT is PEFT's")
    kept = {}
    for series in (False, True):
        model = tiny_model()
        w0 = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        settings = peft.OFTConfig(oft_block_size=8, target_modules=["up_proj"], use_cayley_neumann=series)
        model = peft.get_peft_model(model, settings)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                nn.init.normal_(parameter, std=0.1)
        weight = model.merge_and_unload().model.layers[0].mlp.up_proj.weight.detach()
        kept[series] = (float(row_gram_drift(weight.double(), w0.double())), weight - w0)
    assert kept[False][0] < 1e-11
    assert kept[True][0] > 100 * kept[False][0]
    cosine = (kept[False][1] * kept[True][1]).sum() / kept[False][1].norm() / kept[True][1].norm()
    assert cosine < -0.5


def test_config_takes_one_kind_of_adapter():
    with pytest.raises(ValueError, match="exclude each other"):
        ModelConfig.model_validate({"lora": {"r": 2}, "adapter": {"kind": "oft"}})

"""The attention for bf16 on a CPU against float64, beside transformers' SDPA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibtrain.config import ModelConfig
from calibtrain.models import cpu_attention
from calibtrain.models.loading import load_model
from tests.tiny import write_tiny_model


def exact(query, key, value, mask):
    """Float64, head by head."""
    query, key, value = query.double(), *(x.double().repeat_interleave(3, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("kind", ["causal", "additive", "boolean"])
@pytest.mark.parametrize("width", [2, 40])
def test_output_and_gradients(kind, width):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, width, 8, generator=generator).bfloat16().requires_grad_() for heads in (6, 2, 2)
    )
    upstream = torch.randn(2, width, 6, 8, generator=generator).bfloat16()
    mask = torch.ones(2, 1, width, width).tril().bool()
    if kind != "causal":
        mask = mask & (torch.rand(mask.shape, generator=generator) < 0.5) | torch.eye(width).bool()
    given = {
        "causal": None,
        "boolean": mask,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min).bfloat16(),
    }[kind]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    found, _ = cpu_attention.attention(module, query, key, value, given, scaling=0.3)
    assert "scaled_dot_product" not in _names(found)
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    doubles = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = exact(*doubles, mask)
    expected_gradients = torch.autograd.grad(expected, doubles, upstream.double())
    for one, reference in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert (one.double() - reference).norm() <= 0.01 * reference.norm()


def _names(output):
    """Names of the backward nodes that made `output`."""
    names, nodes = "", [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names += node.name().lower()
            nodes += [one for one, _ in node.next_functions]
    return names.replace("scaleddotproduct", "scaled_dot_product")


@pytest.mark.parametrize("why", ["wide", "float32", "no gradient"])
def test_the_rest_is_left_to_sdpa(why):
    width = cpu_attention.WIDEST_ROW + 1 if why == "wide" else 4
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    query = torch.randn(1, 2, width, 8, dtype=dtype, requires_grad=why != "no gradient")
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    found, _ = cpu_attention.attention(module, query, query, query, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2)
    assert torch.equal(found, expected)
    assert why == "no gradient" or "scaled_dot_product" in _names(found)


def test_bf16_models_on_a_cpu_take_it_and_generate(tmp_path):
    write_tiny_model(tmp_path)
    ids = torch.arange(3, 19)[None]
    models = {
        attention: load_model(ModelConfig(source=str(tmp_path), attention=attention, dtype="bf16"))
        for attention in ("sdpa", "eager")
    }
    assert models["sdpa"].config._attn_implementation == cpu_attention.NAME
    hidden = {name: model(ids).logits for name, model in models.items()}
    torch.testing.assert_close(hidden["sdpa"], hidden["eager"], rtol=0.05, atol=0.02)
    models["sdpa"].config.use_cache = True
    new = models["sdpa"].eval().generate(ids, max_new_tokens=4, do_sample=False)
    assert new.shape == (1, 20)
    # What was trained with it is an ordinary model.
    models["sdpa"].save_pretrained(tmp_path / "saved")
    assert cpu_attention.NAME not in (tmp_path / "saved" / "config.json").read_text()

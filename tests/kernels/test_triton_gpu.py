"""The Triton kernels on a real GPU: the same cases as under the interpreter."""

from __future__ import annotations

import pytest
import torch

from calibtrain.ops import fused_linear_token_stats
from calibtrain.ops.reference import reference_token_stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("tokens", "vocabulary", "size"), [(1, 1, 16), (70, 333, 40), (1025, 50257, 768)])
def test_values_and_gradients_are_those_of_the_reference(tokens, vocabulary, size, dtype, tolerance, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("CALIBTRAIN_OPS", "triton")
    setting = "fp32_precision" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "allow_tf32"
    monkeypatch.setattr(torch.backends.cuda.matmul, setting, "ieee" if setting == "fp32_precision" else False)
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, device="cuda") * size**-0.25
        return values.to(dtype).requires_grad_()

    inputs = [draw(tokens, size), draw(vocabulary, size), draw(vocabulary)]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    weights = torch.randn(3, tokens, generator=generator, device="cuda")
    runs = []
    for function, values in (
        (fused_linear_token_stats, inputs),
        (reference_token_stats, [one.detach().double().requires_grad_() for one in inputs]),
    ):
        stats = function(values[0], values[1], targets, bias=values[2], softcap=30.0, logit_scale=0.7)
        runs.append((stats, torch.autograd.grad((torch.stack(stats[:3]) * weights).sum(), values)))
    (stats, gradients), (expected, exact) = runs
    for mine, theirs in zip(stats[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, exact, strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-12)

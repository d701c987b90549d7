"""The norm of gradients is right at the size of real ones."""

import pytest
import torch

from calibtrain.training import gradient_passes
from calibtrain.training.gradient_passes import ROW, leave_out_passes, squared_norm


def test_squared_norm_keeps_its_precision_at_the_size_of_an_embedding():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(2**24 + 5, generator=generator) * 1e-3
    tensors = [large, large[:7].view(7, 1), large[:0], large[: 2 * ROW].view(2, ROW).t(), large[: 3 * ROW].bfloat16()]
    expected = sum(float(one.double().square().sum()) for one in tensors)
    assert float(squared_norm(tensors)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    assert not squared_norm([torch.ones(3), torch.tensor([1.0, bad])]).isfinite()
    assert float(squared_norm([])) == 0.0


def test_an_untested_deepspeed_does_its_own_work(monkeypatch):
    class Optimizer:
        compute_grad_norm, cpu_offload = True, True

    left_out, own = Optimizer(), Optimizer()
    leave_out_passes(left_out, 1)
    assert "get_grad_norm_direct" in vars(left_out)
    monkeypatch.setattr(gradient_passes.importlib.metadata, "version", lambda name: "0.20.0")
    leave_out_passes(own, 1)
    assert not vars(own)

"""The norm of gradients is right at the size of real ones."""

import pytest
import torch

from calibtrain.training.gradient_passes import ROW, squared_norm


def test_squared_norm_keeps_its_precision_at_the_size_of_an_embedding():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(2**24 + 5, generator=generator) * 1e-3
    tensors = [large, large[:7].view(7, 1), large[:0], large[: 2 * ROW].view(2, ROW).t(), large[: 3 * ROW].bfloat16()]
    expected = sum(float(one.double().square().sum()) for one in tensors)
    assert float(squared_norm(tensors)) == pytest.approx(expected, rel=1e-6)
    assert (
        abs(float(torch.linalg.vector_norm(large).double().square()) / float(large.double().square().sum()) - 1) > 1e-5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    assert not squared_norm([torch.ones(3), torch.tensor([1.0, bad])]).isfinite()
    assert float(squared_norm([])) == 0.0

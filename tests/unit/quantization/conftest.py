"""What tests of folds and rotations share."""

import pytest
import torch


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and softmax in float64 too; the models' own code says float32."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

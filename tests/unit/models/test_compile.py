"""A training step compiles into one graph: forward, the fused op, loss, and the same gradients."""

from __future__ import annotations

import pytest
import torch

from calibtrain.data.collate import collate
from calibtrain.losses.orpo import ORPOLoss
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from tests.tiny import tiny_model
from tests.unit.models.test_shared_prefix import sequences


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", [{}, {"packing_tokens": 24, "shared_prefix": True}])
def test_a_step_has_no_graph_break(layout):
    model = LossModel(Policy(tiny_model(layers=1)), ORPOLoss(nll_scope="full"))
    batch = collate(sequences(), 0, "full", **layout)
    step = TrainStep(batch, {name: count.float() for name, count in model.counts(batch).items()})
    loss, _ = model(step)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found_loss, statistics = compiled(step)
    found = torch.autograd.grad(found_loss, list(model.parameters()))
    torch.testing.assert_close(found_loss, loss)
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-7)
    assert not statistics.stats.logprob.requires_grad

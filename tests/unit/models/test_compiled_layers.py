"""model.compile: one compilation for all layers and widths, the same gradients; decoding is left alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from calibtrain.config import ModelConfig, RunConfig
from calibtrain.data.collate import collate
from calibtrain.errors import UserError
from calibtrain.models import compiled, loading
from calibtrain.models.policy import Policy
from tests.tiny import write_tiny_model
from tests.unit.models.test_shared_prefix import sequences


@pytest.fixture
def counted(monkeypatch):
    """Counts compilations, without the C++ that they would be turned into."""
    torch._dynamo.reset()
    compiled._training_forward.cache_clear()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    yield counter
    torch._dynamo.reset()
    compiled._training_forward.cache_clear()


def compilations(counter):
    """Compiled graphs that compute anything; dynamo also makes empty ones on its way."""
    return sum(any(node.op.startswith("call") for node in one.graph.nodes) for one in counter.graphs)


def gradient(model, **layout):
    """Of the targets' mean log-prob, as one vector."""
    policy = Policy(model)
    model.zero_grad()
    batch = collate(sequences(), 0, "full", **layout)
    policy.token_stats(policy.hidden_at_targets(batch), batch.targets).logprob.mean().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora": {"r": 2}}])
def test_gradients_are_the_same_and_layers_share_a_compilation(counted, options, tmp_path):
    write_tiny_model(tmp_path)
    config = ModelConfig(source=str(tmp_path), dtype="fp32", **options)
    torch.manual_seed(0)
    plain = loading.load_model(config)
    torch.manual_seed(0)
    model = loading.load_model(config.model_copy(update={"compile": True}))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert plain.config.num_hidden_layers > 1
    for multiple in (8, 16, 24):
        torch.testing.assert_close(
            gradient(model, pad_to_multiple=multiple), gradient(plain, pad_to_multiple=multiple), rtol=1e-4, atol=1e-6
        )
    kinds = 2 if "lora" in options else 1  # the first layer's input has no gradient where the embedding is frozen
    assert compilations(counted) == kinds
    gradient(model, shared_prefix=True)  # with a mask
    assert compilations(counted) == 2 * kinds
    with torch.no_grad():
        model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False, use_cache=True)
    assert compilations(counted) == 2 * kinds


def test_what_cannot_be_compiled_is_told_first(monkeypatch, tmp_path):
    write_tiny_model(tmp_path)
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    with pytest.raises(UserError, match=r"model\.compile needs a C\+\+ compiler"):
        loading.load_model(ModelConfig(source=str(tmp_path), compile=True))
    with pytest.raises(UserError, match="does not name its layers"):
        compiled.compile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="zero_stage 0, 1 or 2"):
        RunConfig.model_validate({"model": {"compile": True}, "training": {"zero_stage": 3}})

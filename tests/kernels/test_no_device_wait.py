"""No op makes the host wait for a GPU, forward or backward: an instrument sees every operation that reads a value."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses import IDKLoss, RewardModelLoss, SFTLoss
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.models.reward import RewardLossModel, ValueLossModel
from calibtrain.ops import (
    answer_logprobs,
    answer_logprobs_at,
    checks,
    fused_linear_token_stats,
    linear_blocks,
    token_set,
    token_set_logprobs,
    token_stats,
)
from calibtrain.spectral.shared_rotation import SharedRotationLinear
from tests.tiny import tiny_model

TOKENS, VOCABULARY, SIZE = 9, 300, 16


# On a GPU each of these copies a number to the host, and so waits for all work before it.
WAITS = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip


class NoWait(TorchDispatchMode):
    """Raises where an operation would make the host wait, also inside of our own operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = {
            torch.ops.calibtrain.linear_token_stats.default: token_stats._forward._init_fn,
            torch.ops.calibtrain.linear_token_stats_backward.default: token_stats._backward._init_fn,
        }.get(func)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in chosen)
        if by_mask or (name in WAITS and not (name == "repeat_interleave" and "self_int" in func.__name__)):
            raise WouldWait(func.__name__)
        return func(*args, **(kwargs or {}))


class WouldWait(AssertionError):
    """The host would wait."""


class Launches(types.ModuleType):
    """Stands for the module of the Triton kernels, which then write nothing."""

    def __getattr__(self, kernel):
        return Grid(lambda *arguments, **named: None)


class Grid:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


@pytest.fixture(params=["triton", "torch"])
def path(request, monkeypatch):
    """Inputs are taken to be on a GPU, whose implementation is one of these two."""
    monkeypatch.setattr(checks, "_on_gpu", lambda tensor: True)
    for module in (token_stats, token_set, answer_logprobs):
        monkeypatch.setattr(module, "ops_path", lambda hidden: request.param)
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (make peers)")
        launches = Launches("calibtrain.ops.triton_kernels")
        monkeypatch.setitem(sys.modules, "calibtrain.ops.triton_kernels", launches)
        monkeypatch.setattr("calibtrain.ops.triton_kernels", launches, raising=False)
    monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", 100)
    monkeypatch.setattr(linear_blocks, "BLOCK_LOGITS", 1)
    return request.param


def inputs():
    hidden, weight, bias = (torch.randn(shape) for shape in ((TOKENS, SIZE), (VOCABULARY, SIZE), (VOCABULARY,)))
    leaves = [one.bfloat16().requires_grad_() for one in (hidden, weight, bias)]
    return *leaves, torch.randint(0, VOCABULARY, (TOKENS, 2))[:, 1]


def test_the_instrument_sees_a_wait():
    values, square = torch.randn(3), torch.eye(3)
    for wait in (
        lambda: bool((values > 0).all()),
        values[0].item,
        lambda: values[values > 0],
        lambda: values.index_put_((values > 0,), values[0]),
        lambda: torch.linalg.solve(square, square),
    ):
        with NoWait(), pytest.raises(WouldWait):
            wait()


def test_token_statistics_forward_and_backward(path):
    hidden, weight, bias, targets = inputs()
    with NoWait():
        stats = fused_linear_token_stats(hidden, weight, targets, bias=bias, softcap=3.0, logit_scale=0.7)
        (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert None not in (hidden.grad, weight.grad, bias.grad)


def test_token_sets(path):
    hidden, weight, bias, targets = inputs()
    with NoWait():
        tokens = torch.arange(3)
        token_set_logprobs(hidden, weight, targets, torch.randn(TOKENS), tokens, bias=bias).sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_answers_at_temperatures(path):
    hidden, weight, bias, targets = inputs()
    with NoWait():
        found = answer_logprobs_at(hidden, weight, targets, torch.rand(25), bias=bias, softcap=3.0)
    assert found.shape == (TOKENS, 25)


def test_what_is_refused_on_a_cpu_fails_on_the_device(path):
    """`torch._assert_async`: an error on a CPU as well, but none that the host asks for."""
    hidden, weight, _, targets = inputs()
    logprob, wrong = torch.randn(TOKENS), torch.full((1,), VOCABULARY)
    for call in (
        lambda: fused_linear_token_stats(hidden, weight, targets - VOCABULARY),
        lambda: token_set_logprobs(hidden, weight, targets, logprob, wrong),
        lambda: answer_logprobs_at(hidden, weight, targets, torch.zeros(2)),
    ):
        with NoWait(), pytest.raises(RuntimeError, match=r"outside the vocabulary|not positive"):
            call()


def test_rotation_adapter():
    layer = SharedRotationLinear(nn.Linear(8, 6), 4)
    with NoWait():
        layer(torch.randn(3, 8)).sum().backward()
    assert layer.skew.grad.shape == (6,)


MODELS = {
    "sft": lambda policy: LossModel(policy, SFTLoss()),
    "idk": lambda policy: LossModel(policy, IDKLoss(token_set=[7])),
    "reward": lambda policy: RewardLossModel(policy, RewardModelLoss()),
    "value": lambda policy: ValueLossModel(policy, SFTLoss()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_around_the_decoder(path, name, monkeypatch):
    """The decoder's layers are transformers', whose masks may read whether a row is packed: they are left out."""
    monkeypatch.setattr(Batch, "_check_rows", lambda batch: None)  # reads a batch on a CPU alone
    batch = collate([Encoded((5, 6, 7, 8 + role, 1), 3, role, 0, pair_id=0) for role in (CHOSEN, REJECTED)], 2)
    model = MODELS[name](Policy(tiny_model()))
    embedding = model.policy.causal_model.get_input_embeddings()
    monkeypatch.setattr(
        Policy, "backbone", lambda policy, input_ids, **_: SimpleNamespace(last_hidden_state=embedding(input_ids))
    )
    step = TrainStep(batch, {term: torch.tensor(1.0) for term in model.counts(batch)})
    with NoWait():
        loss, _ = model(step)
        loss.backward()
    assert embedding.weight.grad is not None

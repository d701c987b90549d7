"""Log-probs of a few tokens equal those of the whole log-softmax, whatever the head does to its logits."""

from __future__ import annotations

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.ops import fused_linear_token_stats, token_set_logprobs
from calibtrain.ops.reference import reference_logits

HEADS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"logit_scale": 0.3},
    {"bias": True, "softcap": 2.0, "logit_scale": 1.7},
]


def inputs(dtype=torch.float64, count=9, vocabulary=31, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, weight, offset if bias else None, targets


def both(options, dtype=torch.float64):
    options = dict(options)
    hidden, weight, bias, targets = inputs(dtype, bias=options.pop("bias", False))
    token_set = torch.tensor([4, 0, 30, 4])
    stats = fused_linear_token_stats(hidden, weight, targets, bias=bias, **options)
    ours = token_set_logprobs(hidden, weight, targets, stats.logprob, token_set, bias=bias, **options)
    wide = [one if one is None else one.double() for one in (hidden, weight, bias)]
    dense = reference_logits(wide[0], wide[1], bias=wide[2], **options).log_softmax(1)[:, token_set]
    return ours, dense, [one for one in (hidden, weight, bias) if one is not None]


@pytest.mark.parametrize("options", HEADS)
def test_equals_log_softmax_with_gradients(options):
    ours, dense, leaves = both(options)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    for actual, expected in zip(
        torch.autograd.grad((ours * upstream).sum(), leaves),
        torch.autograd.grad((dense * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_low_precision_is_off_by_a_logits_rounding(dtype, tolerance):
    ours, dense, _ = both({}, dtype)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), dense, rtol=0, atol=tolerance)


def test_the_target_itself_keeps_its_logprob():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, targets = inputs(dtype)
        stats = fused_linear_token_stats(hidden, weight, targets)
        ours = token_set_logprobs(hidden, weight, targets, stats.logprob, targets)
        torch.testing.assert_close(ours.diagonal(), stats.logprob, rtol=1e-6, atol=2e-6)


def test_never_above_zero_and_the_gradient_passes():
    """A token of probability 1 - 1e-9 beside a target of probability 1e-9: rounding must not make it more than certain."""
    weight = torch.tensor([[20.7], [0.0]], requires_grad=True)
    hidden = torch.ones(50, 1).mul(torch.linspace(0.9, 1.1, 50)[:, None]).requires_grad_()
    targets = torch.ones(50, dtype=torch.int64)
    stats = fused_linear_token_stats(hidden, weight, targets)
    ours = token_set_logprobs(hidden, weight, targets, stats.logprob, torch.tensor([0]))
    assert (ours <= 0).all()
    assert torch.autograd.grad(ours.sum(), weight)[0].isfinite().all()


def test_no_positions_and_wrong_tokens():
    hidden, weight, _, targets = inputs(count=0)
    stats = fused_linear_token_stats(hidden, weight, targets)
    assert token_set_logprobs(hidden, weight, targets, stats.logprob, torch.tensor([1, 2])).shape == (0, 2)
    for wrong in (31, -1):
        with pytest.raises(UserError, match="token_set"):
            token_set_logprobs(hidden, weight, targets, stats.logprob, torch.tensor([1, wrong]))

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
    """In bf16 but for the rounding of its own logit, which `stats` has and the set has not."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 0.02)):
        hidden, weight, _, targets = inputs(dtype)
        stats = fused_linear_token_stats(hidden, weight, targets)
        ours = token_set_logprobs(hidden, weight, targets, stats.logprob, targets)
        torch.testing.assert_close(ours.diagonal(), stats.logprob, rtol=1e-6, atol=tolerance)


def test_bf16_differences_between_tokens_are_those_of_float32_logits():
    """Of 41 answers with logits near 20, bf16 logits tell a few apart and move P(yes) by percents."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator).bfloat16()
    direction = weight[4].float() + weight[9].float()
    hidden = (direction * 0.035 + 0.01 * torch.randn(41, 512, generator=generator)).bfloat16()
    targets = torch.randint(64, (41,), generator=generator)
    stats = fused_linear_token_stats(hidden, weight, targets)
    ours = token_set_logprobs(hidden, weight, targets, stats.logprob, torch.tensor([4, 9]))
    exact = hidden.double() @ weight.double()[[4, 9]].t()
    assert exact.min() > 10
    difference = (exact[:, 0] - exact[:, 1]).sigmoid()
    rounded = (hidden @ weight[[4, 9]].t()).double()
    assert ((rounded[:, 0] - rounded[:, 1]).sigmoid() - difference).abs().max() > 0.01  # the regime it speaks of
    torch.testing.assert_close((ours[:, 0] - ours[:, 1]).sigmoid().double(), difference, rtol=0, atol=2e-5)
    assert (ours[:, 0] - ours[:, 1]).unique().numel() == 41


def test_bf16_gradients_of_thousands_of_equal_rows_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = (1.0 + 0.1 * torch.randn(8192, 4, generator=generator)).bfloat16()
    weight = torch.randn(31, 4, generator=generator).bfloat16().requires_grad_()
    targets = torch.full((8192,), 3)
    logprob, token_set = torch.zeros(8192) - 5.0, torch.tensor([4, 0, 3, 4])
    token_set_logprobs(hidden, weight, targets, logprob, token_set).sum().backward()
    wide = weight.detach().double().requires_grad_()
    logits = hidden.double() @ wide.t()
    (logits[:, token_set] - logits[:, 3:4]).sum().backward()
    assert wide.grad[3].abs().min() > 8192  # terms of 1 beside a sum of thousands: bf16 would stop at 256
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=2**-8, atol=1e-3)


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

"""fused_linear_token_stats against the float64 reference: values, gradients, memory, extremes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibtrain.errors import UserError
from calibtrain.ops import answer_logprobs_at, block_torch, fused_linear_token_stats, linear_blocks, linear_logprobs
from calibtrain.ops.reference import reference_logits, reference_token_stats

VOCABULARY, HIDDEN = 33, 6
FLAGS = [
    pytest.param(False, None, 1.0, id="plain"),
    pytest.param(True, None, 1.0, id="bias"),
    pytest.param(False, 2.0, 1.0, id="softcap"),
    pytest.param(False, None, 0.7, id="scale"),
    pytest.param(True, 2.0, 0.7, id="all"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of the vocabulary, the last one narrower: some kept in the gradient, some beside it, some neither."""
    monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", 5)
    monkeypatch.setattr(linear_blocks, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(block_torch, "SLICE_LOGITS", 20)


def make_inputs(size, dtype=torch.float64, vocabulary=VOCABULARY, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(size)
    h = torch.randn(size, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (size,), generator=generator)
    return h, w, b, targets


def upstream(stats, seed=1):
    """A scalar with arbitrary gradients of the three differentiable statistics."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, stats.logprob.shape[0], generator=generator, dtype=torch.float64)
    return sum((w * s.double()).sum() for w, s in zip(weights, stats[:3], strict=True))


@pytest.mark.parametrize(("with_bias", "softcap", "scale"), FLAGS)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 65])
def test_float64_equals_reference(size, with_bias, softcap, scale):
    h, w, b, targets = make_inputs(size)
    flags = {"bias": b if with_bias else None, "softcap": softcap, "logit_scale": scale}
    leaves = (h, w, b) if with_bias else (h, w)
    actual, expected = (op(h, w, targets, **flags) for op in (fused_linear_token_stats, reference_token_stats))
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, msg=name)
    assert [s.requires_grad for s in actual] == [True, True, True, False, False]
    gradients = (torch.autograd.grad(upstream(stats), leaves) for stats in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("path", ["cpp", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), FLAGS)
def test_low_precision_near_reference(dtype, tolerance, with_bias, softcap, scale, path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_OPS", path)
    h, w, b, targets = make_inputs(65, dtype)
    leaves = [h, w, b] if with_bias else [h, w]
    actual = fused_linear_token_stats(h, w, targets, bias=leaves[2] if with_bias else None, softcap=softcap,
                                      logit_scale=scale)  # fmt: skip
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference_token_stats(exact[0], exact[1], targets, bias=exact[2] if with_bias else None,
                                     softcap=softcap, logit_scale=scale)  # fmt: skip
    assert [s.dtype for s in actual] == [torch.float32] * 4 + [torch.bool]
    for a, e in zip(actual[:4], expected[:4], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    for leaf, a, e in zip(
        leaves,
        torch.autograd.grad(upstream(actual), leaves),
        torch.autograd.grad(upstream(expected), exact),
        strict=True,
    ):
        assert a.dtype == leaf.dtype
        assert (a.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize(("with_bias", "softcap", "scale"), FLAGS)
def test_gradcheck_and_opcheck(with_bias, softcap, scale):
    h, w, b, targets = make_inputs(9, vocabulary=11, hidden=3)
    bias = b if with_bias else None

    def stats(*leaves):
        result = fused_linear_token_stats(
            leaves[0], leaves[1], targets, bias=leaves[2] if with_bias else None, softcap=softcap, logit_scale=scale
        )
        return result[:3]

    assert torch.autograd.gradcheck(stats, (h, w, b) if with_bias else (h, w))
    for keep, for_weight in ((True, True), (True, False), (False, False)):
        arguments = (h, w, targets, bias, softcap, scale, keep, for_weight)
        # With its results in the user's hands, opcheck would have the backward change an output of a compiled graph: kept
        # logits never are one, as test_compiles_without_graph_breaks shows.
        checks = (
            ("test_schema", "test_autograd_registration", "test_faketensor")
            if keep
            else ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )
        torch.library.opcheck(torch.ops.calibtrain.linear_token_stats, arguments, test_utils=checks)
        with torch.no_grad():
            outputs = torch.ops.calibtrain.linear_token_stats(*arguments)
        ones = torch.ones(9, dtype=torch.float64)
        for grads, needed in (
            ((ones, ones, ones), [True, True, with_bias]),
            ((ones, None, None), [True, False, False]),
        ):
            torch.library.opcheck(
                torch.ops.calibtrain.linear_token_stats_backward,
                (*grads, h.detach(), w.detach(), targets, None if bias is None else bias.detach(), softcap, scale,
                 *outputs[:3], *outputs[5:], keep, needed),
            )  # fmt: skip


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradient_of_each_subset_of_statistics(used):
    h, w, _, targets = make_inputs(10)
    gradients = []
    for op in (fused_linear_token_stats, reference_token_stats):
        stats = op(h, w, targets)
        gradients.append(torch.autograd.grad(sum((k + 1) * stats[k].square().sum() for k in used), (h, w)))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_costs_no_gradient(frozen, monkeypatch):
    h, w, _, targets = make_inputs(9)
    (h if frozen == "hidden" else w).requires_grad_(False)
    sizes = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.calibtrain.linear_token_stats_backward.default:
                sizes.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Spy():
        fused_linear_token_stats(h, w, targets).logprob.sum().backward()
    assert sizes == [[frozen != "hidden", frozen != "weight", False]]
    assert (h.grad is None) == (frozen == "hidden")
    assert (w.grad is None) == (frozen == "weight")


def test_extreme_logits_stay_finite():
    h = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    w = torch.tensor([[1e4], [-1e4], [0.0], [9.99e3]], requires_grad=True)
    targets = torch.tensor([1, 1, 3])
    stats = fused_linear_token_stats(h, w, targets)
    torch.testing.assert_close(stats.logprob, torch.tensor([-2e4, 0.0, -1.3862944]))
    assert stats.correct.tolist() == [False, True, False]
    upstream(stats).backward()
    for tensor in (*stats[:4], h.grad, w.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
def test_log_odds_survive_a_probability_that_rounds_to_one(gap):
    """For one token against one other, logit(p) is the gap itself, with gradient 1: also where float32 has p = 1."""
    from calibtrain.losses.orpo import log_odds

    h = torch.tensor([[1.0]], requires_grad=True)
    w = torch.tensor([[gap], [0.0]])
    odds = log_odds(fused_linear_token_stats(h, w, torch.tensor([0])).logprob)
    odds.sum().backward()
    expected = min(gap, 43.7)  # log1mexp holds its value above -1e-19
    torch.testing.assert_close(odds.item(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(h.grad.item(), gap if gap < 43 else 0.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["cpp", "torch"])
def test_number_of_blocks_changes_nothing_but_rounding(monkeypatch, path):
    monkeypatch.setenv("CALIBTRAIN_OPS", path)
    h, w, b, targets = make_inputs(65, torch.float32, vocabulary=300)
    exact = [leaf.detach().double().requires_grad_() for leaf in (h, w, b)]
    expected = torch.autograd.grad(upstream(reference_token_stats(*exact[:2], targets, bias=exact[2])), exact)
    for width in (1, 3, 16, 64, 299, 300, 1000):
        monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", width)
        actual = torch.autograd.grad(upstream(fused_linear_token_stats(h, w, targets, bias=b)), (h, w, b))
        for a, e in zip(actual, expected, strict=True):
            assert (a.double() - e).norm() <= 1e-6 * e.norm()


def test_hidden_gradient_is_summed_in_float32_for_bfloat16(monkeypatch):
    """4096 equal contributions, one a block: a bfloat16 running sum would stop growing after 256 of them."""
    monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", 1)
    w = torch.ones(4096, 1, dtype=torch.bfloat16)
    h = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    fused_linear_token_stats(h, w, torch.zeros(1, dtype=torch.long)).logprob.sum().backward()
    assert abs(h.grad.item()) < 1e-2  # 1 - 1/4096 against 4095 times 1/4096
    w[2048:] = 2.0
    h.grad = None
    fused_linear_token_stats(h, w, torch.zeros(1, dtype=torch.long)).logprob.sum().backward()
    torch.testing.assert_close(h.grad.item(), -0.5, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("tokens", "hidden_size", "products"), [(6, 16, 3.0), (40, 16, 3.41), (400, 2, 3.97)])
def test_kept_logits_save_the_fourth_product(tokens, hidden_size, products, monkeypatch):
    """Few tokens for the hidden size: all logits wait in the weight's gradient and beside it. Many: few of them do."""
    h, w, _, targets = make_inputs(tokens, torch.float32, 500, hidden_size)

    flops, mm = [], torch.mm

    def counting(left, right, **options):
        flops.append(left.shape[0] * left.shape[1] * right.shape[1])
        return mm(left, right, **options)

    monkeypatch.setattr(torch, "mm", counting)
    fused_linear_token_stats(h, w, targets).logprob.sum().backward()
    gradient_of_hidden = 1  # addmm_ in float32
    assert sum(flops) / (tokens * hidden_size * 500) + gradient_of_hidden == pytest.approx(products, abs=0.03)


def test_a_second_backward_computes_again_what_the_first_used_up():
    h, w, _, targets = make_inputs(10, torch.float32)
    loss = upstream(fused_linear_token_stats(h, w, targets))
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert first[1].data_ptr() != again[1].data_ptr()


@pytest.mark.parametrize("path", ["cpp", "torch"])
@pytest.mark.parametrize("tokens", [0, 1, 9, 65])
def test_every_byte_of_a_result_is_written(tokens, path, monkeypatch):
    """New memory holds NaN: none of it may come out."""
    monkeypatch.setenv("CALIBTRAIN_OPS", path)
    h, w, b, targets = make_inputs(tokens, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        stats = fused_linear_token_stats(h, w, targets, bias=b)
        gradients = torch.autograd.grad(upstream(stats), (h, w, b))
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (*stats[:4], *gradients):
        assert tensor.isfinite().all()


def test_logprobs_alone_prepare_no_gradient():
    h, w, b, targets = make_inputs(9, torch.bfloat16)
    logprob = linear_logprobs(h, w, targets, bias=b, softcap=3.0)
    torch.testing.assert_close(logprob, fused_linear_token_stats(h, w, targets, bias=b, softcap=3.0).logprob.detach())
    assert not logprob.requires_grad
    with LargestTensor() as spy:
        linear_logprobs(h, w, targets)
    assert spy.largest < w.numel()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_surface_as_nan(bad, softcap):
    h, w, _, targets = make_inputs(9, torch.float32)
    h.data[4, 2] = bad
    stats = fused_linear_token_stats(h, w, targets, softcap=softcap)
    for s in stats[:4]:
        assert s.isnan().nonzero().flatten().tolist() == [4]
    upstream(stats).backward()
    assert h.grad[4].isnan().all()
    assert h.grad[:4].isfinite().all()
    w.data[5, 0] = bad
    assert fused_linear_token_stats(h, w, targets, softcap=softcap).logprob.isnan().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_logits_are_never_held(monkeypatch):
    size, vocabulary, budget = 200, 500, 5000
    monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", budget // size)
    h, w, _, targets = make_inputs(size, torch.float32, vocabulary, 4)
    temperatures = torch.tensor([0.5, 1.0, 2.0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        upstream(fused_linear_token_stats(h, w, targets)).backward()
        answer_logprobs_at(h, w, targets, temperatures)
    allocations = [event.nbytes() for event in _allocations(profile) if event.nbytes() > 0]
    assert budget * 4 in allocations
    assert max(allocations) <= budget * 4
    with LargestTensor() as spy:
        reference_token_stats(h, w, targets)
    assert spy.largest >= size * vocabulary  # the instrument sees what the reference holds


def _allocations(profile):
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_without_graph_breaks(dtype, dynamic):
    h, w, b, targets = make_inputs(9, dtype)

    def loss(h, w, b):
        stats = fused_linear_token_stats(h, w, targets, bias=b, softcap=3.0)
        return (stats.logprob - 2.0 * stats.entropy + stats.sum_p2.square()).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for a, e in zip(
        torch.autograd.grad(compiled(h, w, b), (h, w, b)), torch.autograd.grad(loss(h, w, b), (h, w, b)), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_strided_inputs():
    h, w, _, targets = make_inputs(9)
    h_strided, w_strided = (x.detach().t().contiguous().t().requires_grad_() for x in (h, w))
    expected = torch.autograd.grad(upstream(fused_linear_token_stats(h, w, targets)), (h, w))
    actual = torch.autograd.grad(
        upstream(fused_linear_token_stats(h_strided, w_strided, targets)), (h_strided, w_strided)
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("bad", [-1, -100, VOCABULARY])
def test_target_out_of_range(bad):
    h, w, _, targets = make_inputs(5)
    targets[3] = bad
    for call in (
        lambda: fused_linear_token_stats(h, w, targets),
        lambda: answer_logprobs_at(h, w, targets, torch.ones(1)),
    ):
        with pytest.raises(UserError, match=f"found {bad}"):
            call()


def test_arguments_that_do_not_fit():
    h, w, b, targets = make_inputs(5)
    for message, arguments, flags in (
        ("do not fit", (h, w[:, :3], targets), {}),
        ("targets must be", (h, w, targets[:4]), {}),
        ("targets must be", (h, w, targets.int()), {}),
        ("bias must be", (h, w, targets), {"bias": b[:3]}),
        ("share a floating dtype", (h.float(), w, targets), {}),
        ("softcap must be positive", (h, w, targets), {"softcap": 0.0}),
    ):
        with pytest.raises(UserError, match=message):
            fused_linear_token_stats(*arguments, **flags)


@pytest.mark.parametrize(("with_bias", "softcap", "scale"), FLAGS)
@pytest.mark.parametrize("size", [0, 1, 65])
def test_answer_logprobs_at_temperatures(size, with_bias, softcap, scale):
    h, w, b, targets = make_inputs(size)
    flags = {"bias": b if with_bias else None, "softcap": softcap, "logit_scale": scale}
    temperatures = torch.tensor([0.05, 0.7, 1.0, 3.0, 100.0])
    actual = answer_logprobs_at(h, w, targets, temperatures, **flags)
    logits = reference_logits(h, w, **flags)
    expected = [torch.log_softmax(logits / t, dim=1).gather(1, targets[:, None]) for t in temperatures.tolist()]
    torch.testing.assert_close(actual, torch.cat(expected, dim=1).detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual[:, 2], fused_linear_token_stats(h, w, targets, **flags).logprob.detach())
    assert not actual.requires_grad


@pytest.mark.parametrize("path", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), FLAGS)
def test_answer_logprobs_are_as_precise_in_bf16_as_in_float32(dtype, with_bias, softcap, scale, path, monkeypatch):
    """The stated bound, at logits of standard deviation 3; products in bf16 are off by .4 at T = .1."""
    monkeypatch.setenv("CALIBTRAIN_OPS", path)
    monkeypatch.setattr(linear_blocks, "LEAST_WIDTH", 300)
    h, w, b, targets = make_inputs(40, dtype, vocabulary=2000, hidden=576)
    w = (w.detach() / 8).to(dtype)
    temperatures = torch.logspace(-1, 1, 25)
    flags = {"softcap": softcap, "logit_scale": scale}
    actual = answer_logprobs_at(h, w, targets, temperatures, bias=b if with_bias else None, **flags)
    wide = reference_logits(h.double(), w.double(), bias=b.double() if with_bias else None, **flags)
    expected = [torch.log_softmax(wide / t, dim=1).gather(1, targets[:, None]) for t in temperatures.tolist()]
    error = (actual.double() - torch.cat(expected, dim=1)).abs()
    assert actual.dtype == torch.float32
    assert (error < 1e-5 / temperatures + 1e-6).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_temperatures_must_be_positive(bad):
    h, w, _, targets = make_inputs(2)
    with pytest.raises(UserError, match="positive"):
        answer_logprobs_at(h, w, targets, torch.tensor([1.0, bad]))

"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the Triton path against the float64 reference, as JSON."""

from __future__ import annotations

import json
import math
import sys

import torch

from calibtrain.ops import fused_linear_token_stats
from calibtrain.ops.reference import reference_token_stats

CASES = {  # tokens, vocabulary, hidden size, bias, softcap, scale, dtype
    "plain": (5, 200, 48, False, None, 1.0, "float32"),
    "bias_softcap_scale": (70, 333, 40, True, 3.0, 0.7, "float32"),
    "bfloat16": (70, 333, 40, True, 3.0, 0.7, "bfloat16"),
    "float16": (9, 130, 32, False, None, 1.0, "float16"),
    "one": (1, 1, 16, True, None, 1.0, "float32"),
    "none": (0, 7, 16, True, None, 1.0, "float32"),
}
UPSTREAM = {"logprob": (1, 0, 0), "entropy": (0, 1, 0), "sum_p2": (0, 0, 1), "all": (1, 1, 1)}


def main() -> None:
    """Print {case: {quantity: error}}."""
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: what a kernel leaves out would come out
    assert torch.empty(3).isnan().all()
    found = {f"{name}/{kind}": errors(kind, *case) for name, case in CASES.items() for kind in UPSTREAM}
    json.dump({**found, "extreme": extreme(), "not finite": not_finite()}, sys.stdout)


def errors(kind, tokens, vocabulary, size, with_bias, softcap, scale, dtype) -> dict[str, float]:
    """Largest errors of the statistics, and relative errors (norm) of the gradients."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()

    inputs = [draw(tokens, size), draw(vocabulary, size), *([draw(vocabulary)] if with_bias else [])]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.randn(3, tokens, generator=generator) * torch.tensor(UPSTREAM[kind])[:, None]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    runs = []
    for function, (hidden, weight, *bias) in ((fused_linear_token_stats, inputs), (reference_token_stats, exact)):
        stats = function(hidden, weight, targets, bias=bias[0] if bias else None, softcap=softcap, logit_scale=scale)
        chosen = [(stats[i] * weights[i]).sum() for i in range(3) if UPSTREAM[kind][i]]
        runs.append((stats, torch.autograd.grad(sum(chosen), [hidden, weight, *bias])))
    (stats, gradients), (expected, exact_gradients) = runs
    result = {}
    for name, mine, theirs in zip(stats._fields, stats, expected, strict=True):
        assert mine.shape == theirs.shape
        result[name] = (mine.double() - theirs.double()).abs().max().item() if tokens else 0.0
    for name, mine, theirs in zip(("d hidden", "d weight", "d bias"), gradients, exact_gradients, strict=False):
        assert mine.dtype == getattr(torch, dtype)
        distance, size = (mine.double() - theirs).norm().item(), theirs.norm().item()
        result[name] = distance / size if size > 1e-12 else distance
    return result


def extreme() -> dict[str, float]:
    """A target whose probability rounds to 1, and one that is hopeless."""
    hidden, weight = torch.tensor([[1.0] + [0.0] * 15] * 2), torch.zeros(300, 16)
    weight[7, 0] = 30.0
    targets = torch.tensor([7, 8])
    mine = fused_linear_token_stats(hidden, weight, targets)
    likely = -math.log1p(299 * math.exp(-30.0))  # in closed form: a log-softmax loses it, in float64 too
    errors = [abs(float(value) / exact - 1) for value, exact in zip(mine.logprob, (likely, likely - 30.0), strict=True)]
    return {"logprob near 0": errors[0], "logprob near -30": errors[1]}


def not_finite() -> dict[str, list[bool]]:
    """Which rows are NaN: those with a NaN or an infinity in them."""
    hidden = torch.ones(4, 16)
    hidden[1, 3], hidden[2, 3] = float("nan"), float("inf")
    weight = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    stats = fused_linear_token_stats(hidden, weight, torch.zeros(4, dtype=torch.int64))
    return {name: getattr(stats, name).isnan().tolist() for name in ("logprob", "entropy", "sum_p2", "confidence")}


if __name__ == "__main__":
    main()

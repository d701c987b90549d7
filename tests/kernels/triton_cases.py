"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the Triton path against the float64 reference, as JSON."""

from __future__ import annotations

import json
import math
import sys
from contextlib import contextmanager, nullcontext

import torch

from calibtrain.ops import (
    answer_logprobs,
    answer_logprobs_at,
    fused_linear_token_stats,
    linear_blocks,
    triton_token_stats,
)
from calibtrain.ops.reference import reference_logits, reference_token_stats

# With these every program walks over several blocks of the vocabulary, and the backward pass takes several turns.
FEW_PROGRAMS = {"WAVES": 1, "MULTIPROCESSORS": {80: 2}, "MIN_COLUMNS": 1, "GRADIENT_BYTES": 4 * 70 * 128}
CASES = {  # tokens, vocabulary, hidden size, bias, softcap, scale, dtype
    "plain": (5, 200, 48, False, None, 1.0, "float32"),
    "bias_softcap_scale": (70, 333, 40, True, 3.0, 0.7, "float32"),
    "bfloat16": (70, 333, 40, True, 3.0, 0.7, "bfloat16"),
    "float16": (9, 130, 32, False, None, 1.0, "float16"),
    "loops": (70, 400, 40, True, 3.0, 0.7, "float32"),
    "loops_few_tokens": (33, 400, 72, False, None, 1.0, "float32"),
    "loops_bfloat16": (70, 400, 72, True, 3.0, 0.7, "bfloat16"),
    "one": (1, 1, 16, True, None, 1.0, "float32"),
    "none": (0, 7, 16, True, None, 1.0, "float32"),
}
UPSTREAM = {"logprob": (1, 0, 0), "entropy": (0, 1, 0), "sum_p2": (0, 0, 1), "all": (1, 1, 1)}


def main() -> None:
    """Print {case: {quantity: error}}."""
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: what a kernel leaves out would come out
    assert torch.empty(3).isnan().all()
    found = {}
    for name, case in CASES.items():
        with few_programs() if name.startswith("loops") else nullcontext():
            kinds = ("sum", "all") if name.startswith("loops") else UPSTREAM
            found |= {f"{name}/{kind}": errors(kind, *case) for kind in kinds}
    with few_programs():
        found["laid out"] = laid_out()
        found["temperatures"] = {dtype: temperature_errors(dtype) for dtype in ("float32", "bfloat16", "float16")}
    json.dump({**found, "extreme": extreme(), "not finite": not_finite()}, sys.stdout)


@contextmanager
def few_programs():
    """The constants of FEW_PROGRAMS, and the loops that they are to bring about, counted."""
    before = {name: getattr(triton_token_stats, name) for name in FEW_PROGRAMS}
    kernel, turns = triton_token_stats._launch_gradients, []
    try:
        for name, value in FEW_PROGRAMS.items():
            setattr(triton_token_stats, name, value)
        triton_token_stats._launch_gradients = lambda *arguments: turns.append(1) or kernel(*arguments)
        yield turns
    finally:
        triton_token_stats._launch_gradients = kernel
        for name, value in before.items():
            setattr(triton_token_stats, name, value)
    blocks = triton_token_stats.BLOCKS[80, 4].statistics
    assert 70 / blocks.tokens > 1  # several blocks of tokens
    assert -(-400 // blocks.vocabulary) > sum(FEW_PROGRAMS["MULTIPROCESSORS"].values())  # more blocks than splits
    assert len(turns) > 1


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN (or the largest id) between them, in every direction."""
    filler = float("nan") if tensor.is_floating_point() else 2**31
    wide = torch.full([3 * size for size in tensor.shape], filler, dtype=tensor.dtype)
    view = wide[tuple(slice(1, None, 3) for _ in tensor.shape)]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


def laid_out() -> dict[str, bool]:
    """Whether results and gradients are the same bits when one argument, or all, are laid out otherwise in memory."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden": torch.randn(70, 40, generator=generator),
        "weight": torch.randn(333, 40, generator=generator),
        "targets": torch.randint(0, 333, (70,), generator=generator),
        "bias": torch.randn(333, generator=generator),
        "upstream": torch.randn(70, generator=generator),
    }
    kinds = {name: {name: spread(one)} for name, one in arguments.items()}
    kinds["all"] = {name: spread(one) for name, one in arguments.items()}
    kinds["targets of a table"] = {"targets": torch.stack([arguments["targets"] * 0, arguments["targets"]], 1)[:, 1]}
    kinds["hidden transposed"] = {"hidden": arguments["hidden"].t().contiguous().t()}
    kinds["one row of hidden"] = {"hidden": arguments["hidden"][:1].expand(70, -1)}
    kinds["one upstream"] = {"upstream": torch.ones(1).expand(70)}

    def results(upstream, **inputs):
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        stats = fused_linear_token_stats(leaves[0], leaves[1], inputs["targets"], bias=leaves[2], softcap=5.0)
        outputs = list(stats[:3])
        gradients = torch.autograd.grad(outputs, leaves, [upstream] * 3)
        return [one.detach() for one in (*stats, *gradients)]

    found = {}
    for kind, changed in kinds.items():
        plain = {name: changed.get(name, one).detach().clone(memory_format=torch.contiguous_format)
                 for name, one in arguments.items()}  # fmt: skip
        mine = results(**{name: changed.get(name, one).detach() for name, one in arguments.items()})
        found[kind] = all(torch.equal(one, other) for one, other in zip(mine, results(**plain), strict=True))
    return found


def temperature_errors(dtype: str) -> dict[str, float]:
    """Largest error of answer_logprobs_at times T, over blocks of the vocabulary that do not divide it."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(getattr(torch, dtype)) for shape in ((9, 40), (333, 40), (333,))
    )
    targets = torch.randint(0, 333, (9, 2), generator=generator)[:, 1]
    temperatures = torch.logspace(-1, 1, 11)
    found = {}
    for name, flags in (("plain", {}), ("head", {"bias": bias, "softcap": 4.0, "logit_scale": 0.7})):
        for width in (333, 100):
            answer_logprobs.GPU_BLOCK_BYTES, linear_blocks.LEAST_WIDTH = 1, width
            linear_blocks.BLOCK_LOGITS = 1
            actual = answer_logprobs_at(hidden, weight, targets, temperatures, **flags).double()
            exact = {**flags, **({"bias": bias.double()} if flags else {})}
            logits = reference_logits(hidden.double(), weight.double(), **exact)
            wanted = [(logits / t).log_softmax(1).gather(1, targets[:, None]) for t in temperatures.tolist()]
            found[f"{name} {width}"] = ((actual - torch.cat(wanted, 1)) * temperatures).abs().max().item()
    return found


def errors(kind, tokens, vocabulary, size, with_bias, softcap, scale, dtype) -> dict[str, float]:
    """Largest errors of the statistics, and relative errors (norm) of the gradients."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()

    inputs = [draw(tokens, size), draw(vocabulary, size), *([draw(vocabulary)] if with_bias else [])]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.randn(3, tokens, generator=generator) * torch.tensor(UPSTREAM.get(kind, (1, 0, 0)))[:, None]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    runs = []
    for function, (hidden, weight, *bias) in ((fused_linear_token_stats, inputs), (reference_token_stats, exact)):
        stats = function(hidden, weight, targets, bias=bias[0] if bias else None, softcap=softcap, logit_scale=scale)
        used = UPSTREAM.get(kind, (1, 0, 0))
        chosen = [(stats[i] * weights[i]).sum() for i in range(3) if used[i]]
        if kind == "sum":  # whose gradient is one number in memory for all tokens
            chosen = [stats.logprob.sum()]
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

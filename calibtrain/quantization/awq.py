"""AWQ: channels that carry large activations get a finer grid; then ranges shrink where the few largest weights waste it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.affine import from_grid, grouped, quantize_tokens, quantize_weight, scale_and_zero, to_grid
from calibtrain.quantization.blocks import Inputs, matrix_of, observe
from calibtrain.quantization.folds import Fold, apply_fold, shared_by_heads
from calibtrain.quantization.inputs import check_finite, over_ranks
from calibtrain.quantization.schemes import Scheme

RATIOS = tuple(step / 20 for step in range(20))  # exponents of mean|X|
SHRINKS = tuple(1 - step / 20 for step in range(10))  # of the largest weight of a group
SEARCH_TOKENS = 512  # that a part of the block runs on, once for each exponent
SEARCH_ROWS = 16  # at least, where texts are long
CLIP_TOKENS = 512
SMALLEST = 1e-4  # of a scale before it is normalised, as published


@dataclass(frozen=True, slots=True)
class _Call:
    """What a part of the block was called with, for some rows of a batch, and which of its tokens are no padding."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]
    real: Tensor  # (rows, T) bool, or (rows x T,) where a mixture reads its tokens in rows


@dataclass(slots=True)
class _Seen:
    """What the layers of a block read, by name within the block."""

    total: dict[str, Tensor] = field(default_factory=dict)  # sum|X_j| (in,), over real tokens
    count: dict[str, int] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)  # (in,)
    high: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)  # some of them
    calls: dict[str, list[_Call]] = field(default_factory=dict)

    def mean(self, name: str) -> Tensor:
        """mean|X_j| (in,) over all ranks."""
        packed = over_ranks(
            torch.cat([self.total[name], self.total[name].new_tensor([self.count[name]])]), dist.ReduceOp.SUM
        )
        return packed[:-1] / packed[-1]


@torch.no_grad()
def awq_block(
    block: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    folds: Sequence[Fold],
    scheme: Scheme,
    layers: Mapping[str, nn.Module],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Search the scales of a block, fold them in place, then search the ranges of its weights (Lin et al. 2306.00978).

    layers: those that will be quantised, by full name; folds with no such target are left out, and other layers only
    follow. Returns (low, high), each (out, groups) in float32, by full name, of every layer but those of queries and keys:
    ranges for `quantize_weight`. Raises UserError where a layer reads NaN or infinite numbers.
    """
    local = {id(module): name for name, module in block.named_modules()}
    names = {local[id(module)]: name for name, module in layers.items()}
    chosen = [fold for fold in folds if fold.observed is not None and any(name in names for name in fold.targets)]
    seen = _look(block, index, batches, chosen, names)
    for fold in chosen:
        targets = [block.get_submodule(name) for name in fold.targets if name in names]
        scale = _search_scale(block, index, fold, targets, seen, scheme)
        apply_fold(block, fold, scale)
        for name in fold.targets:
            seen.tokens[name] = [x / scale for x in seen.tokens.get(name, [])]
    return {
        full: clipped_range(matrix_of(layers[full]), torch.cat(seen.tokens[name]), scheme)
        for name, full in names.items()
        if seen.tokens.get(name) and not _of_queries_and_keys(name)
    }


def scale_of(mean: Tensor, ratio: float) -> Tensor:
    """mean|X|^ratio (in,), over the root of its smallest times its largest; 1 for channels that are always 0."""
    scale = mean.pow(ratio).clamp(min=SMALLEST)
    alive = scale[mean > 0]
    if len(alive) == 0:
        return torch.ones_like(scale)
    return torch.where(mean > 0, scale / (alive.max() * alive.min()).sqrt(), 1.0)


def clipped_range(weight: Tensor, x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(low, high), each (out, groups), whose grid leaves the smallest error of x W^T, group by group.

    weight (out, in), x (tokens, in). The largest weight shrinks by 0 to 45 % in steps of 5 %.
    """
    parts = grouped(weight.float(), scheme.group_size)
    inputs = grouped(x, scheme.group_size).transpose(0, 1)  # (groups, tokens, size)
    if inputs.shape[1] > inputs.shape[2]:
        inputs = inputs.mT @ inputs
        energy = lambda off: ((off @ inputs) * off).sum(-1)  # noqa: E731
    else:
        energy = lambda off: (off @ inputs.mT).square().sum(-1)  # noqa: E731
    low, high, top = parts.amin(-1), parts.amax(-1), parts.abs().amax(-1)
    found, errors = [], []
    for shrink in SHRINKS:
        ends = low.maximum(-top * shrink), high.minimum(top * shrink)
        taken = quantize_weight(weight, scheme.weights, scheme.group_size, *ends).dequantized()
        off = grouped(taken.float(), scheme.group_size) - parts
        found.append(ends)
        errors.append(energy(off.transpose(0, 1)).T)
    best = over_ranks(torch.stack(errors), dist.ReduceOp.SUM)
    least, (low, high) = best[0], found[0]
    for error, ends in zip(best[1:], found[1:], strict=True):  # of equals, the one that shrinks least
        better = error < least
        least, low, high = least.minimum(error), ends[0].where(better, low), ends[1].where(better, high)
    return low, high


def _of_queries_and_keys(name: str) -> bool:
    """What a product of queries and keys comes from is not clipped: its error is not the layer's own."""
    last = name.rpartition(".")[2].lower()
    return last.startswith(("q_", "k_")) or any(one in last for one in ("qkv", "query", "key", "c_attn"))


def _search_scale(
    block: nn.Module, index: int, fold: Fold, targets: Sequence[nn.Module], seen: _Seen, scheme: Scheme
) -> Tensor:
    """The scale (in,) that leaves the smallest error of the part's output when the targets are quantised."""
    name = str(fold.observed)
    mean = shared_by_heads(fold, seen.mean(name), "mean")
    part, calls = block.get_submodule(fold.part), seen.calls[fold.part]
    with _in_float32(part) as dtype:
        expected = [_run(part, call) for call in calls]
        errors = []
        for ratio in RATIOS:
            scale = scale_of(mean, ratio)
            span = (seen.low[name] / scale).amin(), (seen.high[name] / scale).amax()
            with _quantized(targets, scale, scheme, span, dtype):
                found = [_run(part, call) for call in calls]
            each = zip(calls, found, expected, strict=True)
            errors.append(sum((call.real[..., None] * (a - b).square()).sum() for call, a, b in each))
    total = over_ranks(torch.stack([torch.as_tensor(error, device=mean.device) for error in errors]), dist.ReduceOp.SUM)
    if not torch.isfinite(total).any():
        raise UserError(f"block {index}, {fold.part}: gives NaN or infinite numbers; the model is broken or overflows")
    return scale_of(mean, RATIOS[int(total.nan_to_num(nan=torch.inf).argmin())])


def _run(part: nn.Module, call: _Call) -> Tensor:
    found = part(*call.args, **call.named)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def _in_float32(part: nn.Module) -> Iterator[torch.dtype]:
    """Let a part multiply in float32; it gets the very tensors back that it had. Gives its dtype.

    In bfloat16 its own rounding hides that of 8 bits: exponents chosen so cost up to four times the least error.
    """
    kept = [(parameter, parameter.data) for parameter in part.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield kept[0][1].dtype
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _quantized(
    targets: Sequence[Any], scale: Tensor, scheme: Scheme, span: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Iterator[None]:
    """Let layers multiply X / s by Q(W s), X / s on the scheme's grid too where it has one."""

    def read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_on_grid(args[0] / scale, scheme, span).to(args[0].dtype), *args[1:])

    with ExitStack() as stack:
        for module in targets:
            stack.callback(setattr, module.weight, "data", module.weight.data)
            scaled = (matrix_of(module) * scale).to(dtype)
            taken = quantize_weight(scaled, scheme.weights, scheme.group_size).dequantized().to(module.weight.dtype)
            module.weight.data = taken if isinstance(module, nn.Linear) else taken.T
            stack.callback(module.register_forward_pre_hook(read).remove)
        yield


def _on_grid(x: Tensor, scheme: Scheme, span: tuple[Tensor, Tensor]) -> Tensor:
    if scheme.activations is None:
        return x
    if not scheme.static:
        return quantize_tokens(x, scheme.activations)
    scale, zero = scale_and_zero(*span, scheme.activations)
    return from_grid(to_grid(x, scale, zero, scheme.activations), scale, zero)


def _look(
    block: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    folds: Sequence[Fold],
    layers: Mapping[str, str],
) -> _Seen:
    """Run a block once over all batches and note what its layers read."""
    seen = _Seen()
    observed = {str(fold.observed) for fold in folds}
    tokens = sum(int(batch.real.sum()) for batch in batches)

    def see(name: str, x: Tensor, batch: Inputs) -> None:
        check_finite(x, index, name)
        done = seen.count.get(name, 0)
        seen.count[name] = done + len(x)
        if name in observed and len(x):
            x32 = x.float()
            _merge(seen.total, name, x32.abs().sum(0), torch.add)
            _merge(seen.low, name, x32.amin(0), torch.minimum)
            _merge(seen.high, name, x32.amax(0), torch.maximum)
        if name in layers:
            every = -(-tokens // CLIP_TOKENS)
            seen.tokens.setdefault(name, []).append(x[-done % every :: every].float())

    row, texts = 0, sum(len(batch.real) for batch in batches)
    step = max(1, min(-(-tokens // SEARCH_TOKENS), texts // SEARCH_ROWS))
    for batch in batches:
        rows = torch.arange(-row % step, len(batch.real), step)
        row += len(batch.real)
        with ExitStack() as stack:
            for name in {fold.part for fold in folds} if len(rows) else ():
                hook = _keeper(seen.calls.setdefault(name, []), batch.real, rows.to(batch.real.device))
                module = block.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            observe(block, index, [batch], {name: block.get_submodule(name) for name in {*layers, *observed}}, see)
    return seen


def _merge(found: dict[str, Tensor], name: str, value: Tensor, how: Callable[[Tensor, Tensor], Tensor]) -> None:
    found[name] = how(found[name], value) if name in found else value


def _keeper(calls: list[_Call], real: Tensor, rows: Tensor) -> Callable[..., None]:
    """A hook that keeps what a part is called with, for some rows of the batch, in float32."""

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["hidden_states"]
        if x.shape[:2] != real.shape:  # tokens in rows: all of them
            counts = real.flatten() if len(x) == real.numel() else x.new_ones(len(x), dtype=torch.bool)
            calls.append(_Call(_float32(args), _float32(named), counts))
        else:
            calls.append(_Call(_float32(args, rows, real.shape), _float32(named, rows, real.shape), real[rows]))

    return hook


def _float32(value: Any, rows: Tensor | None = None, shape: Sequence[int] = ()) -> Any:
    """Tensors in what a module is called with, as float32 where they are floating, and of some rows where they have them."""
    if isinstance(value, Tensor):
        if rows is not None and value.ndim > 1 and len(value) == shape[0] and (value.ndim > 2 or value.shape == shape):
            value = value[rows]
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_float32(one, rows, shape) for one in value)
    if isinstance(value, dict):
        return {key: _float32(one, rows, shape) for key, one in value.items()}
    return value

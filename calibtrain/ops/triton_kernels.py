"""Triton kernels of the linear token statistics: online softmax forward, recomputed logit gradients backward.

Every accumulator is float32, no kernel uses atomics, and each output is written by one program in a fixed order: equal
inputs give equal bits. Row addresses are 64-bit. Imported only where Triton runs.

Letters: N tokens, H hidden size, V vocabulary; a program holds BLOCK_N x BLOCK_V logits, BLOCK_H of their sums at once.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _bounded(z, softcap):
    """Softcap * tanh(z / softcap), but NaN for an infinite z, which tanh would hide."""
    decay = tl.exp(-2.0 * tl.abs(z) / softcap)
    bounded = softcap * (1.0 - decay) / (1.0 + decay)
    bounded = tl.where(z < 0, -bounded, bounded)
    return tl.where(tl.abs(z) < float("inf"), bounded, float("nan"))


@triton.jit
def _head(product, bias, columns, width, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits of products in the given columns; -inf outside of `width`."""
    z = product
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < width, other=0.0)
    z *= scale
    if HAS_SOFTCAP:
        z = _bounded(z, softcap)
    return tl.where(columns < width, z, float("-inf"))


@triton.jit
def _logits(
    hidden, weight, bias, rows, columns, num_tokens, vocabulary, hidden_size, hidden_stride, weight_stride, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) of one block; arbitrary outside (N, V)."""
    # Rows and columns beyond the end repeat the last one: no mask in the loop.
    safe_rows = tl.minimum(rows, num_tokens - 1).to(tl.int64)
    safe_columns = tl.minimum(columns, vocabulary - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_H)
    hidden_at = hidden + safe_rows[:, None] * hidden_stride + inner[None, :]
    weight_at = weight + safe_columns[:, None] * weight_stride + inner[None, :]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        if EVEN_H:
            h = tl.load(hidden_at)
            w = tl.load(weight_at)
        else:
            inside = (start + inner < hidden_size)[None, :]
            h = tl.load(hidden_at, mask=inside, other=0.0)
            w = tl.load(weight_at, mask=inside, other=0.0)
        if UPCAST:  # the interpreter's bfloat16 product is wrong
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
        hidden_at += BLOCK_H
        weight_at += BLOCK_H
    if HAS_BIAS:
        z += tl.load(bias + safe_columns).to(tl.float32)[None, :]
    z *= scale
    if HAS_SOFTCAP:
        z = _bounded(z, softcap)
    return z


@triton.jit
def _merge(peak, rest, moment, squares, top, peak2, rest2, moment2, squares2, top2):
    """Join the statistics of two sets of logits, the first of lower token ids.

    With e_v = exp(z_v - peak), sums leave out one largest logit, whose e is 1: rest = sum e, squares = sum e^2,
    moment = sum e (z - peak). A sum near 1 would round away what log1p(rest) keeps.
    """
    first = peak >= peak2
    gap = -tl.abs(peak - peak2)
    factor = tl.exp(gap)
    mass = 1.0 + tl.where(first, rest2, rest)  # of the set with the lower peak, under its own peak
    shifted = tl.where(factor == 0.0, 0.0, factor * gap) * mass  # 0 * -inf is NaN, the limit is 0
    moment = tl.where(first, moment, moment2) + factor * tl.where(first, moment2, moment) + shifted
    squares = tl.where(first, squares, squares2) + factor * factor * (1.0 + tl.where(first, squares2, squares))
    rest = tl.where(first, rest, rest2) + factor * mass
    return tl.where(first, peak, peak2), rest, moment, squares, tl.where(first, top, top2)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def partial_statistics(
    hidden, weight, bias, targets, partials, tops, num_tokens, vocabulary, hidden_size, hidden_stride, weight_stride,
    blocks_per_split, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One block of tokens against one split of the vocabulary, in a single pass.

    Writes peak, rest, moment, squares and the target's logit (-inf where it is in another split) to `partials`
    (5, splits, N) float32, and the largest logit's token id to `tops` (splits, N) int32.
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_tokens
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    top = tl.zeros((BLOCK_N,), tl.int32)
    begin = split * blocks_per_split * BLOCK_V
    end = tl.minimum(begin + blocks_per_split * BLOCK_V, vocabulary)
    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z = _logits(
            hidden, weight, bias, rows, columns, num_tokens, vocabulary, hidden_size, hidden_stride, weight_stride,
            softcap, scale, HAS_BIAS, HAS_SOFTCAP, EVEN_H, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        known = (columns < vocabulary)[None, :]
        z = tl.where(known, z, float("-inf"))
        block_peak, index = tl.max(z, axis=1, return_indices=True)
        at_target = columns[None, :] == target[:, None]
        target_logit = tl.maximum(target_logit, tl.max(tl.where(at_target, z, float("-inf")), axis=1))
        z = tl.where(known, z - block_peak[:, None], 0.0)
        is_top = (columns - start)[None, :] == index[:, None]
        e = tl.where(known & (is_top == 0), tl.exp(z), 0.0)
        # e * z is NaN where any logit is not finite, and stays in `moment`.
        peak, rest, moment, squares, top = _merge(
            peak, rest, moment, squares, top,
            block_peak, tl.sum(e, axis=1), tl.sum(e * z, axis=1), tl.sum(e * e, axis=1), start + index,
        )  # fmt: skip
    size = tl.num_programs(1).to(tl.int64) * num_tokens
    at = partials + split.to(tl.int64) * num_tokens + rows
    tl.store(at, peak, mask=inside)
    tl.store(at + size, rest, mask=inside)
    tl.store(at + 2 * size, moment, mask=inside)
    tl.store(at + 3 * size, squares, mask=inside)
    tl.store(at + 4 * size, target_logit, mask=inside)
    tl.store(tops + split.to(tl.int64) * num_tokens + rows, top, mask=inside)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, to float32's relative precision: the hardware's logarithm loses it near 1."""
    s = tl.where(x < 0.5, x, 0.0) / (2.0 + tl.where(x < 0.5, x, 0.0))
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11))))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def combine_statistics(partials, tops, targets, statistics, correct, num_tokens, splits, BLOCK_N: tl.constexpr):
    """Join the splits in order.

    Writes logprob, entropy, sum_p2, confidence, peak and log_normalizer to `statistics` (6, N) float32, `correct` (N,).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_tokens
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    top = tl.zeros((BLOCK_N,), tl.int32)
    size = splits.to(tl.int64) * num_tokens
    for split in range(0, splits):
        at = partials + split * num_tokens.to(tl.int64) + rows
        peak, rest, moment, squares, top = _merge(
            peak, rest, moment, squares, top,
            tl.load(at, mask=inside, other=0.0), tl.load(at + size, mask=inside, other=0.0),
            tl.load(at + 2 * size, mask=inside, other=0.0), tl.load(at + 3 * size, mask=inside, other=0.0),
            tl.load(tops + split * num_tokens.to(tl.int64) + rows, mask=inside, other=0),
        )  # fmt: skip
        target_logit = tl.maximum(target_logit, tl.load(at + 4 * size, mask=inside, other=0.0))
    normalizer = 1.0 + rest
    log_normalizer = _log1p(rest)
    entropy = log_normalizer - moment / normalizer
    poison = entropy * 0.0  # NaN where any logit of the row is not finite
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    at = statistics + rows
    size = num_tokens.to(tl.int64)
    tl.store(at, target_logit - peak - log_normalizer + poison, mask=inside)
    tl.store(at + size, entropy, mask=inside)
    tl.store(at + 2 * size, (1.0 + squares) / (normalizer * normalizer) + poison, mask=inside)
    tl.store(at + 3 * size, 1.0 / normalizer + poison, mask=inside)
    tl.store(at + 4 * size, peak, mask=inside)
    tl.store(at + 5 * size, log_normalizer, mask=inside)
    tl.store(correct + rows, (top == target).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def logit_gradients(
    hidden, weight, bias, targets, coefficients, gradients, bias_partials, num_tokens, vocabulary, hidden_size,
    hidden_stride, weight_stride, first_column, num_columns, gradient_stride, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_BIAS: tl.constexpr, EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Recompute one block's logits; write the gradient of hidden @ weight.T there, in the dtype of `gradients`.

    `coefficients` (6, N) float32 holds peak, log_normalizer, a, b, c and at_target: the gradient in z_v is
    p_v (a + b log p_v + c p_v), and at_target for the target. `gradients` holds the columns from `first_column` on.
    `bias_partials` (row blocks, num_columns) float32 takes each block's sum over its tokens.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(num_tokens, BLOCK_N)
    # Programs of GROUP neighbouring column blocks walk down the tokens together, to meet in the L2 cache.
    group = program // (GROUP * row_blocks)
    group_size = tl.minimum(tl.cdiv(num_columns, BLOCK_V) - group * GROUP, GROUP)
    column_block = group * GROUP + program % group_size
    row_block = (program % (GROUP * row_blocks)) // group_size
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    places = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + places
    z = _logits(
        hidden, weight, bias, rows, columns, num_tokens, vocabulary, hidden_size, hidden_stride, weight_stride,
        softcap, scale, HAS_BIAS, HAS_SOFTCAP, EVEN_H, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    inside = rows < num_tokens
    size = num_tokens.to(tl.int64)
    at = coefficients + rows
    peak = tl.load(at, mask=inside, other=0.0)
    log_normalizer = tl.load(at + size, mask=inside, other=0.0)
    logp = z - peak[:, None] - log_normalizer[:, None]
    p = tl.exp(logp)
    factor = tl.load(at + 2 * size, mask=inside, other=0.0)[:, None]
    factor += tl.load(at + 3 * size, mask=inside, other=0.0)[:, None] * logp
    factor += tl.load(at + 4 * size, mask=inside, other=0.0)[:, None] * p
    gradient = p * factor
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    at_target = tl.load(at + 5 * size, mask=inside, other=0.0)
    gradient = tl.where(columns[None, :] == target[:, None], at_target[:, None], gradient)
    if HAS_SOFTCAP:
        bounded = z / softcap
        gradient *= 1.0 - bounded * bounded
    gradient *= scale
    written = inside[:, None] & (places < num_columns)[None, :]
    to = gradients + rows.to(tl.int64)[:, None] * gradient_stride + places[None, :]
    tl.store(to, gradient.to(gradients.dtype.element_ty), mask=written)
    if NEED_BIAS:
        total = tl.sum(tl.where(written, gradient, 0.0), axis=0)
        tl.store(bias_partials + row_block.to(tl.int64) * num_columns + places, total, mask=places < num_columns)


@triton.jit(do_not_specialize=["num_tokens", "start", "num_temperatures"])
def temperature_sums(
    products, bias, targets, inverse, state, rest, num_tokens, start, width, num_temperatures, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's block of products, (N, width) float32 from token id `start` on, for all temperatures at once.

    `inverse` (K,) float64 holds 1 / T. `state` (6, N) and `rest` (K, N), float64, are those of
    `block_torch.new_temperature_state`: the rows of the largest logit, the target's logit and the poison, and the sums of
    exp((z - largest) / T) over all entries but the largest.
    """
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    kinds = tl.arange(0, BLOCK_K)
    row = products + token * width
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_V,), tl.int32)
    poison = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, width, BLOCK_V):
        columns = first + lanes
        product = tl.load(row + columns, mask=columns < width, other=0.0)
        z = _head(product, bias, columns, width, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        poison += product * 0.0
        place = tl.where(z > largest, columns, place)
        largest = tl.maximum(largest, z)
    peak, lane = tl.max(largest, axis=0, return_indices=True)
    top = tl.sum(tl.where(lanes == lane, place, 0), axis=0)
    size = num_tokens.to(tl.int64)
    at = state + token
    before = tl.load(at).to(tl.float32)
    factor = tl.load(inverse + kinds, mask=kinds < num_temperatures, other=0.0).to(tl.float32)
    rest_at = rest + kinds.to(tl.int64) * size + token
    total = tl.load(rest_at, mask=kinds < num_temperatures, other=0.0).to(tl.float32)
    larger = peak > before
    # The former largest entry joins the sums; the new one leaves them, as in `_merge`.
    total = tl.where(larger, tl.exp((before - peak) * factor) * (1.0 + total), total)
    top = tl.where(larger, top, -1)
    peak = tl.where(larger, peak, before)
    sums = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    for first in range(0, width, BLOCK_V):
        columns = first + lanes
        product = tl.load(row + columns, mask=columns < width, other=0.0)
        z = _head(product, bias, columns, width, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        counted = (columns < width) & (columns != top)
        e = tl.exp((z - peak)[:, None] * factor[None, :])
        sums += tl.where(counted[:, None], e, 0.0)
    total += tl.sum(sums, axis=0)
    tl.debug_barrier()  # every thread has read the sums before the first one writes
    tl.store(rest_at, total.to(tl.float64), mask=kinds < num_temperatures)
    tl.store(at, peak.to(tl.float64), mask=larger)
    target = tl.load(targets + token) - start
    here = (target >= 0) & (target < width)
    column = tl.where(here, target, 0)
    z = _head(tl.load(row + column), bias, column, width, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    tl.store(at + 4 * size, z.to(tl.float64), mask=here)
    tl.store(at + 5 * size, tl.load(at + 5 * size) + tl.sum(poison, axis=0))

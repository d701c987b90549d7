"""The rotation penalties of a LoRA layer, exactly and without estimators: W = W0 + s B A, so D = s B A has rank r.

`a` (r, in) and `b` (out, r) are the adapter's matrices, `s` its scaling. Each form needs one product of W0 (or of its polar
factor) with r vectors, as much work as r tokens; the rest is of size r. An update of rank r cannot be an exact rotation
unless the rotation moves r directions only: expect the Gram drift to keep a floor, and prefer `row_stretch`. Row forms
take `image` = W0 A^T (out, r). Column forms are row forms of the transpose: give them a = B^T, b = A^T and
`image` = W0^T B (in, r). All are differentiable in what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from calibtrain.losses.rotation_probes import Shard


def lora_row_gram_drift(a: Tensor, b: Tensor, image: Tensor, s: float, norm: float) -> Tensor:
    """|W W^T - W0 W0^T|_F^2 / `norm`, norm = |W0 W0^T|_F^2, by tr(M N M N), N = [B C]^T [B C], C = `image`.

    The change is [B C] M [B C]^T with M = [[s^2 A A^T, s I], [s I, 0]]. Returns ().
    """
    r = a.shape[0]
    eye = torch.eye(r, dtype=a.dtype, device=a.device)
    middle = torch.cat([torch.cat([s**2 * (a @ a.mT), s * eye], 1), torch.cat([s * eye, 0 * eye], 1)])
    both = torch.cat([b, image], 1)
    product = middle @ (both.mT @ both)
    return (product * product.mT).sum() / norm


def lora_row_stretch(a: Tensor, b: Tensor, image: Tensor, s: float, norm: float) -> Tensor:
    """|sym(D W0^T)|_F^2 / `norm`: s^2 / 2 [tr(B^T B C^T C) + tr((B^T C)^2)], C = `image`. `a` enters through C only."""
    del a
    inner = b.mT @ image
    return s**2 / 2 * (((b.mT @ b) * (image.mT @ image)).sum() + (inner * inner.mT).sum()) / norm


def lora_polar_drift(a: Tensor, b: Tensor, image: Tensor, s: float, norm: float) -> Tensor:
    """`polar_drift` for out >= in, `image` = O0^T B (in, r), `norm` = |W0|_F^2; for out < in give the transposes.

    W0 itself costs nothing, so only D counts: s^2 / 2 [tr(P^T P A A^T) - tr((A P)^2)] for the skew part, P = `image`, and
    s^2 tr((B^T B - P^T P) A A^T) for what leaves the columns of O0.
    """
    gram, own, inner = a @ a.mT, image.mT @ image, a @ image
    skew = ((own * gram).sum() - (inner * inner.mT).sum()) / 2
    return s**2 * (skew + ((b.mT @ b - own) * gram).sum()) / norm


def lora_angle_budget(a: Tensor, b: Tensor, s: float, norm: float, budget: float = 0.0) -> Tensor:
    """max(0, s^2 tr(B^T B A A^T) / `norm` - budget^2), norm = |W0|_F^2."""
    return (s**2 * ((b.mT @ b) * (a @ a.mT)).sum() / norm - budget**2).clamp(min=0)


def lora_sums(
    name: str, a: Tensor, b: Tensor, reference: Shard, s: float, norm: float, budget: float = 0.0
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Value () and gradients (r, in), (out, r) of the penalty `name`, from this rank's parts of `a`, `b` and W0.

    `a` and `b` are zero where another rank holds them; `reference` is a piece of W0 (of polar(W0) for polar_drift). Yields
    what wants adding up over ranks, as `rotation_probes.run_together` expects it.
    """
    flat = yield torch.cat([a.reshape(-1), b.reshape(-1)])
    a, b = flat[: a.numel()].view(a.shape), flat[a.numel() :].view(b.shape)
    if name == "angle_budget":
        value, (grad_a, grad_b) = _value_and_gradients(lambda *two: lora_angle_budget(*two, s, norm, budget), a, b)
        return value, grad_a, grad_b
    polar = name == "polar_drift"
    flipped = reference.shape[0] < reference.shape[1] if polar else name.startswith("column_")
    if flipped:
        a, b, reference = b.mT, a.mT, reference.T
    image = yield reference.apply_transposed(b) if polar else reference.apply(a.mT)
    form = _FORMS[name.removeprefix("column_").removeprefix("row_")]
    value, (grad_a, grad_b, grad_image) = _value_and_gradients(lambda *three: form(*three, s, norm), a, b, image)
    behind = yield reference.apply(grad_image) if polar else reference.apply_transposed(grad_image)
    if polar:
        grad_b = grad_b + behind
    else:
        grad_a = grad_a + behind.mT
    return (value, grad_b.mT, grad_a.mT) if flipped else (value, grad_a, grad_b)


_FORMS = {"gram_drift": lora_row_gram_drift, "stretch": lora_row_stretch, "polar_drift": lora_polar_drift}


def _value_and_gradients(form: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in inputs]
        value = form(*leaves)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return value.detach(), gradients

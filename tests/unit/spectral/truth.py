"""Pairs of matrices whose change is known by construction, and the change measured in the plainest float64 way."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibtrain.spectral import drift

KINDS = ("scale", "shared rotation", "independent rotations", "noise", "low rank")


def spectrum(side: int, draw: torch.Generator, repeated: bool) -> Tensor:
    """A falling power law with a little noise; `repeated`: in runs of four equal values."""
    values = 3.0 * torch.arange(1, side + 1, dtype=torch.float64) ** -0.4
    values = values * (1 + 0.05 * torch.rand(side, generator=draw, dtype=torch.float64))
    values = values.sort(descending=True).values
    return values.view(-1, 4).mean(1).repeat_interleave(4) if repeated else values


def orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()


def small_rotation(side: int, angle: float, draw: torch.Generator) -> Tensor:
    skew = torch.randn(side, side, generator=draw, dtype=torch.float64)
    skew = skew - skew.mT
    return torch.linalg.matrix_exp(skew * (angle / torch.linalg.matrix_norm(skew, 2)))


def pair(
    kind: str, shape: tuple[int, int], seed: int, *, repeated: bool = False, size: float = 0.03
) -> tuple[Tensor, Tensor]:
    """(W0, W) in float64; `size` is the angle, or the relative norm, of the change."""
    draw = torch.Generator().manual_seed(seed)
    k = min(shape)
    s = spectrum(k, draw, repeated)
    left, right = orthonormal(shape[0], k, draw), orthonormal(shape[1], k, draw)
    w0 = (left * s) @ right.mT
    if kind == "scale":
        return w0, w0 * (1 + size)
    if kind == "shared rotation":
        q = small_rotation(k, 10 * size, draw)
        return w0, 1.01 * (left @ q * s) @ (right @ q).mT
    if kind == "independent rotations":
        return w0, small_rotation(shape[0], size, draw) @ w0 @ small_rotation(shape[1], size, draw)
    if kind == "low rank":
        change = torch.randn(shape[0], 4, generator=draw, dtype=torch.float64)
        change = change @ torch.randn(4, shape[1], generator=draw, dtype=torch.float64)
    else:
        change = torch.randn(shape, generator=draw, dtype=torch.float64)
    return w0, w0 + change * (size * w0.norm() / change.norm())


def by_svd(w0: Tensor, w: Tensor) -> dict[str, float]:
    """What a row says, from two float64 SVDs and the definitions."""
    u0, s0, v0t = torch.linalg.svd(w0.double(), full_matrices=False)
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    change = w.double() - w0.double()
    k = len(s)
    m = u0.mT @ change @ v0t.mT
    off = m - torch.diag(m.diagonal())
    eigenvalues = torch.linalg.eigvalsh(torch.diag(s0) + (m + m.mT) / 2).flip(0)
    alpha = float((eigenvalues * s0).sum() / s0.square().sum())
    apart = (u0.mT @ u).mT @ (v0t @ vt.mT) - torch.eye(k, dtype=torch.float64)
    log_ratio = (s / s0).log()
    return {
        "relative_drift": float(change.norm() / w0.double().norm()),
        "spectral_norm_ratio": float(s[0] / s0[0]),
        "stable_rank": float(s.square().sum() / s[0] ** 2),
        "median": math.exp(float(log_ratio.quantile(0.5))),
        "spread": float(log_ratio.quantile(0.75) - log_ratio.quantile(0.25)),
        "alpha": alpha,
        "nf": float(apart.norm()) / math.sqrt(k),
        "polar_drift": float(drift.polar_drift(w.double(), u0 @ v0t, w0.double().square().sum())),
        "row_gram_drift": float(drift.row_gram_drift(w.double(), w0.double())),
        "shared_rotation": float(((off - off.mT) / 2).square().sum() / off.square().sum()),
        "scale": float((m.diagonal() * s0).sum() / s0.square().sum()),
        "angle_8": math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(u0[:, :8].mT @ u[:, :8])[-1])))),
    }

"""How far a matrix W (out, in) is from what one kind of change would make of its start W0: rotations, mostly.

Each measure has its own name, because "keeps the structure of W0" means different sets (R, L orthogonal; a > 0 a scale;
S symmetric; K skew):

    row_gram_drift      W = W0 R, or sqrt(a) W0 R     angles and norms of the rows (output neurons): the orbit of OFT
    column_gram_drift   W = L W0, or sqrt(a) L W0     angles and norms of the columns (inputs)
    polar_drift         W = O0 S, O0 = polar(W0)      both singular bases turn by one shared rotation; any stretch
    row_stretch         sym((W - W0) W0^T) = 0        the tangent of row_gram_drift's set: infinitesimal rotations
    column_stretch      sym(W0^T (W - W0)) = 0        the tangent of column_gram_drift's set
    angle_budget        |W - W0| <= budget * |W0|     how far it may go, in any direction

All are exact and differentiable. `calibtrain.losses.rotation` takes them for penalties of training.
"""

from __future__ import annotations

from torch import Tensor


def column_gram_drift(weight: Tensor, initial: Tensor, scale: float | None = 1.0) -> Tensor:
    """|W^T W - a W0^T W0|_F^2 / |W0^T W0|_F^2: zero iff W = sqrt(a) L W0 with L^T L = I.

    `weight`, `initial` (out, in) floating. `scale` is a; None takes the best a >= 0, <G, G0> / |G0|^2, where G and G0 are
    the Gram matrices (the penalty is then (|G| / |G0|)^2 (1 - cos^2(G, G0))). Returns () in the dtype of `weight`.
    """
    drift = weight - initial
    # W^T W - W0^T W0 without a difference of large numbers, which fp32 would not survive.
    change, first = initial.mT @ drift + drift.mT @ weight, initial.mT @ initial
    norm = first.square().sum()
    # At the best scale the penalty's derivative to it is zero: leaving it out of the graph changes no gradient.
    excess = ((change * first).sum() / norm).detach() if scale is None else scale - 1.0
    return (change - excess * first).square().sum() / norm


def row_gram_drift(weight: Tensor, initial: Tensor, scale: float | None = 1.0) -> Tensor:
    """|W W^T - a W0 W0^T|_F^2 / |W0 W0^T|_F^2: zero iff W = sqrt(a) W0 R with R orthogonal, the orbit of OFT.

    It keeps every angle between output neurons, hence the hyperspherical energy (Qiu et al. 2023, arXiv 2306.07280).
    Arguments as for `column_gram_drift`.
    """
    return column_gram_drift(weight.mT, initial.mT, scale)


def polar_drift(weight: Tensor, polar: Tensor, squared_norm: Tensor | float) -> Tensor:
    """(|skew(O0^T W)|_F^2 + |(I - O0 O0^T) W|_F^2) / |W0|_F^2 with O0 = polar(W0): zero iff W = O0 S, S symmetric.

    That holds W = U0 Q (a S0) Q^T V0^T: both singular bases of W0 turned by the same Q (He, Cao 2025, arXiv 2509.17866).
    It is convex and charges nothing for a change of spectrum; far from W0 an indefinite S also scores 0. For out < in
    the factors stand on the other side (W = S O0).

    `weight` (out, in); `polar` (out, in) from `calibtrain.spectral.polar_factor(W0)`; `squared_norm` |W0|_F^2.
    """
    if weight.shape[0] < weight.shape[1]:
        weight, polar = weight.mT, polar.mT
    inner = polar.mT @ weight
    skew = (inner - inner.mT) / 2
    outside = weight - polar @ inner
    return (skew.square().sum() + outside.square().sum()) / squared_norm


def column_stretch(weight: Tensor, initial: Tensor) -> Tensor:
    """|sym(W0^T D)|_F^2 / |W0^T W0|_F^2, D = W - W0: zero iff W0^T D is skew, as for D = K W0, K skew.

    `column_gram_drift` to first order (its Gram drift is 2 sym(W0^T D) + D^T D): convex and quadratic, it charges stretch
    and forgives infinitesimal rotations; a finite rotation costs its second order.
    """
    inner = initial.mT @ (weight - initial)
    norm = (initial.mT @ initial).square().sum()
    return ((inner + inner.mT) / 2).square().sum() / norm


def row_stretch(weight: Tensor, initial: Tensor) -> Tensor:
    """|sym(D W0^T)|_F^2 / |W0 W0^T|_F^2, D = W - W0: zero iff D W0^T is skew, as for D = W0 K, K skew."""
    return column_stretch(weight.mT, initial.mT)


def angle_budget(weight: Tensor, initial: Tensor, budget: float = 0.0) -> Tensor:
    """max(0, |W - W0|_F^2 / |W0|_F^2 - budget^2): zero iff the relative drift is within `budget`.

    A rotation penalty alone lets a layer turn as far as it likes. Turning W0 by an angle t in every plane is a drift of
    2 sin(t / 2). With budget 0 it is the decay to the starting point, L2-SP (Li, Grandvalet, Davoine 2018,
    arXiv 1802.01483).
    """
    drift = (weight - initial).square().sum() / initial.square().sum()
    return (drift - budget**2).clamp(min=0)

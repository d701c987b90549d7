"""Weight penalties that forgive one kind of change of a matrix and charge every other: rotations, mostly.

A layer's `weight` W (out, in) started at `initial` W0. Each penalty has its own name, because "keeps the structure of W0"
means different sets (R, L orthogonal; a > 0 a scale; S symmetric; K skew):

    row_gram_drift      W = W0 R, or sqrt(a) W0 R     angles and norms of the rows (output neurons): the orbit of OFT
    column_gram_drift   W = L W0, or sqrt(a) L W0     angles and norms of the columns (inputs)
    polar_drift         W = O0 S, O0 = polar(W0)      both singular bases turn by one shared rotation; any stretch
    row_stretch         sym((W - W0) W0^T) = 0        the tangent of row_gram_drift's set: infinitesimal rotations
    column_stretch      sym(W0^T (W - W0)) = 0        the tangent of column_gram_drift's set
    angle_budget        |W - W0| <= budget * |W0|     how far it may go, in any direction

The functions here are exact and differentiable, for matrices that are whole in memory. For shards, and for a cost that
does not depend on the width of the model, take the estimators (`calibtrain.losses.rotation_probes`).
"""

from __future__ import annotations

from calibtrain.losses.catalog import LossEntry
from calibtrain.spectral.drift import (
    angle_budget,
    column_gram_drift,
    column_stretch,
    polar_drift,
    row_gram_drift,
    row_stretch,
)

__all__ = [
    "CATALOG",
    "angle_budget",
    "column_gram_drift",
    "column_stretch",
    "polar_drift",
    "row_gram_drift",
    "row_stretch",
]

_COST = "no activations; per sampled matrix and K probes about 14 out*in*K FLOPs once an optimiser step; default < 2%"
CATALOG = tuple(
    LossEntry(
        name=name,
        kind="weight penalty",
        title=title,
        paper=paper,
        equation=equation,
        cost=cost,
        compared_with="float64 formula and autograd; with LoRA the weights that PEFT 0.21.2 merges",
        largest_deviation="1e-9 (value), 1e-9 (gradient) in float64; 1e-6 (gradient) on fp32 shards, 2e-6 with LoRA",
        differs=differs,
    )
    for name, title, paper, equation, cost, differs in (
        (
            "row_gram_drift",
            "Keeps angles and norms of output neurons: forgives W0 R",
            "after Qiu et al. 2023, arXiv 2306.07280",
            "|W W^T - a W0 W0^T|^2 / |W0 W0^T|^2",
            _COST,
            "A penalty on the orbit that OFT makes a hard constraint",
        ),
        (
            "column_gram_drift",
            "Keeps angles and norms of columns: forgives L W0",
            "after Qiu et al. 2023, arXiv 2306.07280",
            "|W^T W - a W0^T W0|^2 / |W0^T W0|^2",
            _COST,
            "",
        ),
        (
            "polar_drift",
            "Forgives one shared rotation of both singular bases, and any stretch",
            "after He, Cao 2025, arXiv 2509.17866",
            "(|skew(O0^T W)|^2 + |(I - O0 O0^T) W|^2) / |W0|^2",
            _COST,
            "The paper measures this structure by SVD and trains nothing; the polar factor states it without one",
        ),
        (
            "row_stretch",
            "Forgives infinitesimal rotations of the input side",
            "first order of row_gram_drift",
            "|sym(D W0^T)|^2 / |W0 W0^T|^2",
            _COST,
            "",
        ),
        (
            "column_stretch",
            "Forgives infinitesimal rotations of the output side",
            "first order of column_gram_drift",
            "|sym(W0^T D)|^2 / |W0^T W0|^2",
            _COST,
            "",
        ),
        (
            "angle_budget",
            "Limits the distance from W0; with budget 0 L2-SP",
            "Li, Grandvalet, Davoine 2018, arXiv 1802.01483",
            "max(0, |W - W0|^2 / |W0|^2 - budget^2)",
            "element-wise, once an optimiser step on the sampled matrices",
            "A ball without cost around the start; per matrix, relative to its norm",
        ),
    )
)

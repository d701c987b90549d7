"""Calibration-aware fine-tuning: pull confidence to the accuracy that held-out answers of that confidence had.

Xiao et al. 2025, "Restoring Calibration for Aligned Large Language Models: A Calibration-Aware Fine-Tuning Approach",
arXiv 2505.01997. Their CFT is `sft` on the domain; this is the regulariser of their RCFT: an E-step that measures
accuracy as a function of confidence, and an M-step that moves confidence there.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import answer_logprob, own_answers, sum_term
from calibtrain.ops import TokenStats, at_least_float32

logger = logging.getLogger(__name__)


def isotonic_fit(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Non-decreasing least-squares fit of accuracy to confidence, by pooling adjacent violators (Ayer et al. 1955).

    `confidence` and `correct` (M,), both in [0, 1]. Returns its distinct confidences, ascending, and the accuracy at each,
    (K,) float64 without gradient. Raises UserError without any.
    """
    if not confidence.numel():
        raise UserError("isotonic_fit needs held-out answers, and got none")
    knots, place = confidence.detach().double().unique(return_inverse=True)
    weights = torch.zeros_like(knots).index_add(0, place, torch.ones_like(place, dtype=torch.float64))
    totals = torch.zeros_like(knots).index_add(0, place, correct.detach().double())
    blocks: list[tuple[float, float, int]] = []  # total, weight, knots
    for total, weight in zip(totals.tolist(), weights.tolist(), strict=True):
        size = 1
        while blocks and blocks[-1][0] * weight >= total * blocks[-1][1]:  # the mean before is not below this one
            more_total, more_weight, more = blocks.pop()
            total, weight, size = total + more_total, weight + more_weight, size + more
        blocks.append((total, weight, size))
    values = [total / weight for total, weight, size in blocks for _ in range(size)]
    return knots, torch.tensor(values, dtype=torch.float64, device=knots.device)


def held_out_target(confidence: Tensor, knots: Tensor, accuracy: Tensor) -> Tensor:
    """Accuracy at each confidence: linear between the knots of `isotonic_fit`, constant beyond them, no gradient. (M,)."""
    q = confidence.detach().to(knots.dtype)
    right = torch.searchsorted(knots, q).clamp(1, max(1, knots.shape[0] - 1))
    left, right = right - 1, right.clamp(max=knots.shape[0] - 1)
    width = (knots[right] - knots[left]).clamp(min=torch.finfo(knots.dtype).tiny)
    share = ((q - knots[left]) / width).clamp(0.0, 1.0)
    return torch.lerp(accuracy[left], accuracy[right], share).to(confidence.dtype)


def calibration_aware_score(confidence: Tensor, target: Tensor) -> Tensor:
    """(q - acc(q))^2. Both (M,) in [0, 1]; returns (M,), differentiable in `confidence` alone.

    The target is data, as in the paper's M-step: it was measured on other answers, and moving q along its slope would change
    what is measured and not what is right.
    """
    return (at_least_float32(confidence) - target.detach()).square()


class CalibrationAwareLoss(nn.Module):
    """Penalty: mean of (q - acc(q))^2 over the ANSWER sequences, q the likelihood of the whole answer.

    Their grades are not used. Call `fit` with held-out answers, which are not among those trained on, before training and
    every so often; as long as there are none the term is 0. The fit is in the module's state. Not a proper score:
    q = acc(q) holds for every calibrated model, also for one that tells nothing apart, so it stands beside an objective.

    Args:
        weight: of the term in the loss.
    """

    name = "calibration_aware"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.knots: tuple[Tensor, Tensor] | None = None
        self._asked = False  # whether anything has been given to `fit`

    def fit(self, confidence: Tensor, correct: Tensor) -> None:
        """E-step: measure accuracy as a function of confidence, (M,) each, on held-out answers; none changes nothing.

        Call it on every rank with the same answers. Logs that there were none where there is no fit yet.
        """
        if not (confidence.numel() or self._asked):
            logger.warning("calibration_aware has no held-out answers to be fitted to, and is 0 until it has")
        self._asked = True
        if confidence.numel():
            self.knots = isotonic_fit(confidence, correct)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`calibration_aware`: the answers with tokens. () int64."""
        return {"calibration_aware": own_answers(batch, graded=False).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `calibration_aware`. Raises UserError in training before the first `fit`."""
        if self.training and not self._asked:
            raise UserError("calibration_aware: call fit with held-out answers before training; without a fit it is 0")
        answers = own_answers(batch, graded=False)
        confidence = answer_logprob(stats, batch, answers).exp()
        if self.knots is None:
            scores = confidence * 0.0
        else:
            target = held_out_target(confidence, *(one.to(confidence.device) for one in self.knots))
            scores = calibration_aware_score(confidence, target)
        return {"calibration_aware": sum_term(scores, answers, self.weight)}

    def get_extra_state(self) -> Tensor:
        """The fit as (2, K) float64, for `state_dict`; K is 0 before the first."""
        return torch.zeros((2, 0)) if self.knots is None else torch.stack(self.knots).cpu()

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the fit of a `state_dict`."""
        self._asked = True
        self.knots = (state[0], state[1]) if state.numel() else None


CATALOG = (
    LossEntry(
        name="calibration_aware",
        kind="penalty",
        title="Confidence pulled to the held-out accuracy at that confidence (RCFT)",
        paper="Xiao et al. 2025, arXiv 2505.01997",
        equation="(q - acc(q))^2, acc(q) held fixed",
        cost="reads TokenStats; answers to held-out questions at each fit",
        compared_with="scikit-learn 1.9 IsotonicRegression (the fit); the formula in float64 (value and gradient)",
        largest_deviation="1e-12 (the fit), 1e-11 (value and gradient, float64)",
        differs=(
            "Accuracy is a monotone function fitted on held-out answers and fitted anew as the model changes; the "
            "public code measures it once, before training, in 10 bins of the training set. The likelihood of any "
            "answer instead of four options read at position -2, and a weight that is what it says, without a factor "
            "of 1e-3."
        ),
    ),
)

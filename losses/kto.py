"""KTO: answers that are each desirable or not, without pairs (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.log_ratios import log_ratios, reference_known
from calibtrain.losses.pairs import check_positive
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch, LossTerm
from calibtrain.ops import TokenStats, at_least_float32


def kto_reference_point(mismatched: Tensor) -> Tensor:
    """z0 = max(0, mean log pi(y'|x) - log pi_ref(y'|x)): what KTO compares with (arXiv 2402.01306).

    `mismatched` (M,) floating: log ratios of answers to other prompts, over all ranks and micro-batches of a step. An
    estimate of KL(pi || pi_ref) that is biased and needs no samples. () without gradient, as in the paper: it is where the
    value function bends, not a quantity to be lowered.
    """
    return at_least_float32(mismatched.detach()).mean().clamp(min=0.0)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_D (1 - sigmoid(beta (h - z0))) of desirable answers, w_U (1 - sigmoid(beta (z0 - h))) of the others.

    It has no finite minimum: an answer that is found desirable more often than not, weights included, is driven up for
    ever, another one down, however doubtful the labels; what slows it is the sigmoid. It makes no calibrated policy.

    `log_ratio` (S,) floating, h = log pi(y|x) - log pi_ref(y|x) of whole completions; `desirable` (S,) bool;
    `reference_point` () is z0. Returns (S,) float32 or float64.
    """
    gain = beta * (at_least_float32(log_ratio) - reference_point)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


class KTOLoss(nn.Module):
    """KTO's loss of CHOSEN (desirable) and REJECTED (undesirable) completions, each for itself.

    Reads `batch.reference_logprob` (N,) and `batch.reference_point` (), z0, which is a number of the whole step:
    `kto_reference_point` of mismatched prompts and answers, before the step's first forward pass. A completion counts
    when all its tokens have reference log-probs.

    Args:
        beta: how strongly the policy is held to the reference.
        desirable_weight: of desirable completions.
        undesirable_weight: of undesirable ones.
    """

    name = "kto"

    def __init__(self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__()
        check_positive(beta=beta)
        if min(desirable_weight, undesirable_weight) < 0 or desirable_weight + undesirable_weight == 0:
            raise UserError(
                "desirable_weight and undesirable_weight must be 0 or more, and not both 0, got "
                f"{desirable_weight} and {undesirable_weight}"
            )
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`kto`: the completions, of both kinds. () int64."""
        return {"kto": _labelled(batch).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `kto`. Raises UserError for a batch without reference log-probs or reference point."""
        labelled = _labelled(batch)
        ratios = log_ratios(stats, batch, labelled)
        point = batch.reference_point
        if point is None:
            if batch.targets.numel():
                raise UserError(
                    "this batch has no reference point: give kto_reference_point of the step's mismatched answers, "
                    "dataclasses.replace(batch, reference_point=...)"
                )
            point = ratios.new_zeros(())
        losses = kto_loss(
            ratios,
            batch.roles == CHOSEN,
            point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return {"kto": LossTerm(torch.where(labelled, losses, 0.0).sum(), labelled.sum())}


def _labelled(batch: Batch) -> Tensor:
    return reference_known(batch) & ((batch.roles == CHOSEN) | (batch.roles == REJECTED))


CATALOG = (
    LossEntry(
        name="kto",
        kind="objective",
        title="Kahneman-Tversky optimisation of answers that are desirable or not, without pairs",
        paper="Ethayarajh et al. 2024, arXiv 2402.01306",
        equation="w_D sigmoid(beta (z0 - h)) or w_U sigmoid(beta (h - z0)), h = log pi(y|x) - log pi_ref(y|x)",
        cost="one forward pass a step over mismatched answers; one of the untrained model over the data, twice, once",
        compared_with="TRL 1.16.0 KTOTrainer",
        largest_deviation="1e-6 (value), 1e-5 (gradient)",
        differs=(
            "z0 is that of the whole step, where TRL takes each micro-batch's over the ranks; every answer is put behind "
            "one other prompt, for good, where TRL takes the neighbour in the micro-batch, which may answer the same one; "
            "one global mean over answers"
        ),
    ),
)

"""Losses of calibtrain, importable with torch alone."""

from __future__ import annotations

import inspect

from torch import nn

from calibtrain.losses.answer_score import AnswerScoreLoss, answer_brier_score, answer_log_score
from calibtrain.losses.causal_lm import (
    batch_from_labels,
    causal_lm_loss,
    token_stats_from_hidden,
    token_stats_from_model,
)
from calibtrain.losses.orpo import ORPOLoss, orpo_odds_ratio_loss
from calibtrain.losses.sft import SFTLoss, nll_sequence_sum, nll_token_sum
from calibtrain.losses.terms import (
    ANSWER,
    CHOSEN,
    REJECTED,
    Batch,
    LossTerm,
    LossTerms,
    Objective,
    global_counts,
    mean_loss,
    normalized_loss,
)

OBJECTIVES: dict[str, type[nn.Module]] = {"sft": SFTLoss, "orpo": ORPOLoss}
"""What a run trains on; exactly one."""

PENALTIES: dict[str, type[nn.Module]] = {"answer_score": AnswerScoreLoss}
"""What may be added to the objective, each with its weight."""


def build_loss(config: object) -> nn.Module:
    """The objective or penalty that `config.name` names, built from those fields of `config` that it takes."""
    loss = {**OBJECTIVES, **PENALTIES}[config.name]  # type: ignore[attr-defined]
    return loss(**{key: getattr(config, key) for key in inspect.signature(loss).parameters})


__all__ = [
    "ANSWER",
    "CHOSEN",
    "OBJECTIVES",
    "PENALTIES",
    "REJECTED",
    "AnswerScoreLoss",
    "Batch",
    "LossTerm",
    "LossTerms",
    "ORPOLoss",
    "Objective",
    "SFTLoss",
    "answer_brier_score",
    "answer_log_score",
    "batch_from_labels",
    "build_loss",
    "causal_lm_loss",
    "global_counts",
    "mean_loss",
    "nll_sequence_sum",
    "nll_token_sum",
    "normalized_loss",
    "orpo_odds_ratio_loss",
    "token_stats_from_hidden",
    "token_stats_from_model",
]

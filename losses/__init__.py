"""Losses of calibtrain, importable with torch alone.

Every function computes and returns float32, or float64 for float64 input; half precision is lifted, not rounded to.

A loss of one's own is any `torch.nn.Module` that keeps the `Objective` protocol; docs/losses-in-your-trainer.md writes one.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from calibtrain.losses import (
    advantages,
    answer_score,
    brier,
    calibration_aware,
    calibration_tuning,
    dpo,
    focal,
    idk,
    importance,
    ipo,
    kl,
    kto,
    orpo,
    policy_gradient,
    pooled,
    refusal,
    reward_model,
    rewards,
    rotation,
    sft,
    simpo,
)
from calibtrain.losses.answer_score import AnswerScoreLoss, answer_brier_score, answer_log_score
from calibtrain.losses.brier import TokenBrierLoss, TokenizedBrierLoss, token_brier, tokenized_brier
from calibtrain.losses.calibration_aware import CalibrationAwareLoss
from calibtrain.losses.calibration_tuning import CorrectnessQueryLoss, DivergenceAnchor
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.causal_lm import (
    causal_lm_loss,
    loss_terms_from_model,
    token_stats_from_hidden,
    token_stats_from_model,
)
from calibtrain.losses.dpo import DPOLoss, dpo_loss
from calibtrain.losses.focal import ConfidencePenalty, FocalLoss, LabelSmoothingLoss, focal_loss
from calibtrain.losses.idk import IDKLoss, idk_loss
from calibtrain.losses.ipo import IPOLoss, ipo_loss
from calibtrain.losses.kto import KTOLoss, kto_loss, kto_reference_point
from calibtrain.losses.label_batch import batch_from_labels
from calibtrain.losses.orpo import ORPOLoss, orpo_odds_ratio_loss
from calibtrain.losses.policy_gradient import GRPOLoss, PPOLoss, RLOOLoss
from calibtrain.losses.pooled import MMCELoss, SoftBinnedECELoss
from calibtrain.losses.refusal import RefusalTuningLoss
from calibtrain.losses.reward_model import RewardModelLoss
from calibtrain.losses.sft import SFTLoss, nll_sequence_sum, nll_token_sum
from calibtrain.losses.simpo import SimPOLoss, simpo_loss
from calibtrain.losses.terms import (
    ANSWER,
    CHOSEN,
    QUERY,
    REJECTED,
    Batch,
    LossTerm,
    LossTerms,
    Objective,
    global_counts,
    mean_loss,
    normalized_loss,
)


def _by_name(*losses: Any) -> dict[str, type[nn.Module]]:
    return {loss.name: loss for loss in losses}


OBJECTIVES = _by_name(
    SFTLoss,
    ORPOLoss,
    DPOLoss,
    IPOLoss,
    SimPOLoss,
    KTOLoss,
    FocalLoss,
    LabelSmoothingLoss,
    IDKLoss,
    RefusalTuningLoss,
    RewardModelLoss,
    GRPOLoss,
    RLOOLoss,
    PPOLoss,
)
"""What a run trains on; exactly one."""

PENALTIES = _by_name(
    AnswerScoreLoss,
    TokenBrierLoss,
    ConfidencePenalty,
    TokenizedBrierLoss,
    CorrectnessQueryLoss,
    DivergenceAnchor,
    CalibrationAwareLoss,
    MMCELoss,
    SoftBinnedECELoss,
)
"""What may be added to the objective, each with its weight."""

CATALOG: tuple[LossEntry, ...] = tuple(
    entry
    for module in (
        sft,
        orpo,
        dpo,
        ipo,
        simpo,
        kto,
        answer_score,
        brier,
        focal,
        idk,
        refusal,
        calibration_tuning,
        calibration_aware,
        pooled,
        reward_model,
        policy_gradient,
        kl,
        advantages,
        importance,
        rewards,
        rotation,
    )
    for entry in module.CATALOG
)
"""Every method there is, in the order of docs/losses.md, which is made from it."""


def build_loss(config: Any, **given: Any) -> nn.Module:
    """The objective or penalty that `config.name` names, from those fields of `config` that it takes, and from `given`.

    `given` holds what a config cannot: what follows from the run's tokenizer, such as `token_set`.
    """
    loss = {**OBJECTIVES, **PENALTIES}[config.name]
    values = {**{name: getattr(config, name) for name in type(config).model_fields}, **given}
    return loss(**{key: values[key] for key in inspect.signature(loss).parameters})


__all__ = [
    "ANSWER",
    "CATALOG",
    "CHOSEN",
    "OBJECTIVES",
    "PENALTIES",
    "QUERY",
    "REJECTED",
    "AnswerScoreLoss",
    "Batch",
    "CalibrationAwareLoss",
    "ConfidencePenalty",
    "CorrectnessQueryLoss",
    "DPOLoss",
    "DivergenceAnchor",
    "FocalLoss",
    "GRPOLoss",
    "IDKLoss",
    "IPOLoss",
    "KTOLoss",
    "LabelSmoothingLoss",
    "LossEntry",
    "LossTerm",
    "LossTerms",
    "MMCELoss",
    "ORPOLoss",
    "Objective",
    "PPOLoss",
    "RLOOLoss",
    "RefusalTuningLoss",
    "RewardModelLoss",
    "SFTLoss",
    "SimPOLoss",
    "SoftBinnedECELoss",
    "TokenBrierLoss",
    "TokenizedBrierLoss",
    "answer_brier_score",
    "answer_log_score",
    "batch_from_labels",
    "build_loss",
    "causal_lm_loss",
    "dpo_loss",
    "focal_loss",
    "global_counts",
    "idk_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "loss_terms_from_model",
    "mean_loss",
    "nll_sequence_sum",
    "nll_token_sum",
    "normalized_loss",
    "orpo_odds_ratio_loss",
    "simpo_loss",
    "token_brier",
    "token_stats_from_hidden",
    "token_stats_from_model",
    "tokenized_brier",
]

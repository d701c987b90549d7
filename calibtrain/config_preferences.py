"""Preference optimisation in closed form: what people use in the place of reinforcement learning from human feedback."""

from __future__ import annotations

from typing import ClassVar, Literal

from calibtrain.config_base import LossSection, Needs, Positive, Smoothing, Weight


class DPOConfig(LossSection):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    name: Literal["dpo"] = "dpo"
    NEEDS: ClassVar = Needs(data="pairs", reference="log-probs")
    beta: Positive = 0.1
    """How strongly the policy is held to the starting model; the reward is beta times the log ratio to it."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences taken to be wrong (cDPO); above 0 it bounds how far the pairs are driven apart."""


class IPOConfig(LossSection):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

    name: Literal["ipo"] = "ipo"
    NEEDS: ClassVar = Needs(data="pairs", reference="log-probs")
    beta: Positive = 0.1
    """The paper's tau: log ratios, a token each, are driven 1 / (2 beta) apart and no further."""


class SimPOConfig(LossSection):
    """Simple preference optimisation, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

    name: Literal["simpo"] = "simpo"
    NEEDS: ClassVar = Needs(data="pairs")
    beta: Positive = 2.0
    """Scale of the reward, the mean log-prob of a token."""
    gamma: Weight = 1.0
    """By how much the chosen answer's reward should exceed the rejected one's."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences taken to be wrong; above 0 it bounds how far the pairs are driven apart."""


class KTOConfig(LossSection):
    """Kahneman-Tversky optimisation, from answers that are desirable or not (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    name: Literal["kto"] = "kto"
    NEEDS: ClassVar = Needs(data="unpaired", reference="log-probs")
    beta: Positive = 0.1
    """How strongly the policy is held to the starting model."""
    desirable_weight: Weight = 1.0
    """Of desirable answers; the paper wants weight x number of the two kinds between 1:1 and 4:3."""
    undesirable_weight: Weight = 1.0
    """Of undesirable answers."""

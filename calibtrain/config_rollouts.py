"""Reinforcement learning in the config: how the policy answers the training questions, what that earns, how it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import BelowOne, Count, Fraction, LossSection, Needs, Positive, Section, Weight


class RolloutsConfig(Section):
    """How the policy answers the training questions, and what its answers earn (docs/losses.md)."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled to each question, at temperature 1; they are one another's baseline."""
    steps_per_round: Count = 1
    """Optimiser steps that share one round of sampling; above 1 the later ones are off-policy, and clipping acts."""
    reward: Literal["accuracy", "brier", "log", "ternary"] = "brier"
    """`accuracy`: 1 if right; `brier`, `log`: a proper score of the confidence, and accuracy_weight if right; `ternary`: 1
    if right, 0 for an abstention, and a wrong answer costs so much that answering pays below abstention.target_risk."""
    confidence: Literal["likelihood", "stated", "head"] = "likelihood"
    """`likelihood`: the probability of the whole answer, a function of the weights, so that its score is a term of the
    loss, answer_score; `stated`: "Confidence: 80%" behind the answer, which is sampled, so that its score is a reward;
    `head`: what confidence_head tells, so that its score is a term of the loss, and no reward."""
    accuracy_weight: Weight | None = None
    """Reward of being right, in `brier` and `log`. null: 0 with `likelihood`, whose score ends at the truth, and with any
    weight here above it (docs/rewards.md); 1 with `stated` and `head`; so little that being wrong would pay is refused."""
    score_weight: Weight = 1.0
    """Of the confidence's score. With `likelihood` a penalty answer_score, `moves: all`, may stand in its place."""
    decoupled: bool = True
    """With `stated` and grpo: the answer's words get the credit of being right, the confidence's words that of the score."""
    target_mixing: Fraction = 0.0
    """With `decoupled`: share of the other samples' mean grade in what the confidence is scored against; less noise, and a
    confidence that is part the answer's chance to be right, part the policy's on that question."""
    format_penalty: float | None = None
    """What an answer that states no confidence earns; below the worst proper score. null: one half below it."""
    abstentions: tuple[str, ...] = ("I don't know",)
    """What counts as abstaining, in `ternary`, compared as the task compares answers."""

    @property
    def score_in_loss(self) -> Literal["brier", "log"] | None:
        """The score that enters the loss, not the reward: that of a confidence which is a function of the weights."""
        return self.reward if self.reward in ("brier", "log") and self.confidence != "stated" else None  # type: ignore[return-value]

    @property
    def reward_of_right(self) -> float:
        """`accuracy_weight` with its default."""
        if self.accuracy_weight is not None:
            return self.accuracy_weight
        return 0.0 if self.score_in_loss and self.confidence == "likelihood" else 1.0

    @property
    def rewards_nothing(self) -> bool:
        """Whether sampling is not rewarded at all, and the score in the loss is what teaches."""
        return self.score_in_loss is not None and self.reward_of_right == 0.0


class PolicyGradientConfig(LossSection):
    """What the on-policy objectives share."""

    clip_low: BelowOne = 0.2
    """The probability ratio to the policy that sampled counts down to 1 - clip_low ..."""
    clip_high: Positive = 0.2
    """... and up to 1 + clip_high."""
    beta: Weight = 0.0
    """Weight of the KL divergence from the starting model; above 0 it is kept, or LoRA's adapters are switched off."""

    NEEDS: ClassVar = Needs(data="rollouts")

    @property
    def needs(self) -> Needs:
        """Rollouts, and the starting model where the KL counts."""
        return replace(self.NEEDS, reference="live" if self.beta > 0 else "none")


class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    name: Literal["grpo"] = "grpo"
    NEEDS: ClassVar = Needs(data="rollouts", word_credit=True)
    norm: Literal["sequence", "token", "constant"] = "sequence"
    """What a sum over tokens is divided by: `sequence` as published, `token` as DAPO, `constant` as Dr. GRPO."""
    length: int | None = Field(default=None, ge=1)
    """The constant of `norm: constant`: the most tokens an answer may have, as in evaluation.max_new_tokens."""
    kl: Literal["k2", "k3", "k3+"] = "k3+"
    """Estimator of the KL in the loss: `k3` as published; `k3+` is right in value and gradient."""
    scale_advantages: Literal["group", "batch", "none"] = "none"
    """Standard deviation that advantages are divided by: `group` as published, which makes a rank of a stated confidence's
    score, so that training ends at certainty: an error with it unless `decoupled`."""

    @model_validator(mode="after")
    def _constant_needs_length(self) -> GRPOConfig:
        if self.norm == "constant" and self.length is None:
            raise ValueError("norm: constant needs `length`, e.g. the value of evaluation.max_new_tokens")
        return self


class RLOOConfig(PolicyGradientConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740); the KL is in the reward."""

    name: Literal["rloo"] = "rloo"


class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv 1707.06347); the KL is in the reward."""

    name: Literal["ppo"] = "ppo"
    NEEDS: ClassVar = Needs(data="rollouts", module="value head")
    value_clip: Positive = 0.2
    """How far a value may move from the one at sampling before its loss stops to fall."""
    value_weight: Weight = 0.1
    """Weight of the value head's loss."""
    gamma: Fraction = 1.0
    """Discount of later rewards, per token."""
    lam: Fraction = 0.95
    """Decay of generalised advantage estimation (arXiv 1506.02438)."""

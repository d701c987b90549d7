"""The losses in the config: objectives, penalties and weight penalties.

A section's fields are its module's arguments, with the same defaults; what else it has says where the data comes from.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import BelowOne, Count, Fraction, LossSection, Needs, Positive, Section, Smoothing, Weight
from calibtrain.config_preferences import DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from calibtrain.config_rollouts import GRPOConfig, PPOConfig, RLOOConfig

NLLScope = Literal["completion", "full"]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


class SFTConfig(LossSection):
    """Cross-entropy on completion tokens (or on prompt and completion with nll_scope=full)."""

    name: Literal["sft"] = "sft"
    NEEDS: ClassVar = Needs(weighs=True)
    nll_scope: NLLScope = "completion"
    """`completion`: cross-entropy of the completion's tokens; `full`: of the prompt's as well."""
    nll_norm: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens of the step; `sequence`: mean over sequences of their token means."""


class ORPOConfig(LossSection):
    """Odds-ratio preference optimisation (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

    name: Literal["orpo"] = "orpo"
    NEEDS: ClassVar = Needs(data="pairs")
    beta: Weight = 0.5
    """Weight of the odds-ratio term, the paper's lambda."""
    nll_scope: NLLScope = "completion"
    """`completion`: cross-entropy of the completion's tokens; `full`: of the prompt's as well."""
    nll_norm: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens of the step; `sequence`: mean over sequences of their token means."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences taken to be wrong; above 0 it bounds how far the pairs are driven apart."""
    odds_ratio_cap: Positive | None = None
    """A pair whose log odds ratio is above this is left alone; null is the paper's form."""


class FocalConfig(LossSection):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002; Mukhoti et al. 2020, arXiv 2002.09437)."""

    name: Literal["focal"] = "focal"
    gamma: Weight = 3.0
    """The focusing exponent; 0 is cross-entropy."""
    sample_dependent: bool = True
    """5 where p < 0.2 and 3 where p < 0.5 instead, `gamma` above."""
    nll_scope: NLLScope = "completion"
    """`completion`: the completion's tokens; `full`: the prompt's as well."""


class LabelSmoothingConfig(LossSection):
    """Cross-entropy, smoothed within a set of answer tokens (Szegedy et al. 2016, arXiv 1512.00567)."""

    name: Literal["label_smoothing"] = "label_smoothing"
    tokens: Annotated[tuple[str, ...], Field(min_length=1)]
    """The answers that can be, each a single token, such as the letters of the options."""
    epsilon: BelowOne = 0.1
    """Probability that is spread evenly over them."""
    nll_scope: NLLScope = "completion"
    """`completion`: the completion's tokens; `full`: the prompt's as well."""


class IDKConfig(LossSection):
    """Cross-entropy that moves probability to an [IDK] token where the model is wrong (arXiv 2412.06676)."""

    name: Literal["idk"] = "idk"
    token: str = "[IDK]"
    """The token; a model that does not have it gets it."""
    scale: Fraction = 0.2
    """Largest share of a wrong token's target that goes to it."""
    regularize: bool = True
    """Also push its probability down where the model is right."""
    nll_scope: NLLScope = "completion"
    """`completion`: the completion's tokens; `full`: the prompt's as well."""


class RefusalConfig(LossSection):
    """Refusal tuning on the model's own graded answers to the training questions (R-Tuning, arXiv 2311.09677)."""

    name: Literal["refusal"] = "refusal"
    NEEDS: ClassVar = Needs(data="relabelled")
    refusal_share: Fraction = 0.5
    """Weight of the refusals, whatever their number."""
    nll_scope: NLLScope = "completion"
    """`completion`: what is said; `full`: the question as well."""
    kind: Literal["statement", "refusal"] = "statement"
    """`statement`: after its answer the model says whether it is sure; `refusal`: it refuses what it did not know."""
    relabel_every: Count = 50
    """Optimiser steps between two rounds in which the model answers the training questions anew."""


class CustomObjectiveConfig(LossSection):
    """A loss of your own (docs/losses-in-your-trainer.md)."""

    name: Literal["custom"] = "custom"
    loss: ImportPath
    """Where it is, `my_package.my_module:MyLoss`, seen from the working directory; naming it runs its code."""
    arguments: dict[str, Any] = Field(default={})
    """Of its constructor."""
    data: Literal["completions", "pairs"] = "completions"
    """What it learns from: completions, or chosen and rejected ones as ORPO does."""
    nll_scope: NLLScope = "completion"
    """`full` makes the prompt's tokens targets as well."""

    @property
    def needs(self) -> Needs:
        """Records, or pairs."""
        return Needs(data="pairs" if self.data == "pairs" else "records")


class RewardModelConfig(LossSection):
    """Reward model with a scalar head, from preference pairs (Bradley, Terry 1952)."""

    name: Literal["reward_model"] = "reward_model"
    margin: Weight = 0.0
    """By how much the chosen answer's reward should exceed the rejected one's."""
    centering: Weight = 0.01
    """Weight of (r_chosen + r_rejected)^2 (arXiv 2312.09244), which fixes the offset that preferences leave open."""
    confidence_statements: Literal["none", "added", "alone"] = "none"
    """PPO-M (arXiv 2410.09724): a good answer that states high confidence should beat the same with low confidence, a bad
    one the reverse. `added`: beside every pair; `alone`: in its place, as published, which teaches no preference."""

    @property
    def needs(self) -> Needs:
        """Pairs and a scalar head."""
        return Needs(data="pairs", module="reward head", statements=self.confidence_statements)


Objective = Annotated[
    SFTConfig
    | ORPOConfig
    | DPOConfig
    | IPOConfig
    | SimPOConfig
    | KTOConfig
    | FocalConfig
    | LabelSmoothingConfig
    | IDKConfig
    | RefusalConfig
    | CustomObjectiveConfig
    | RewardModelConfig
    | GRPOConfig
    | RLOOConfig
    | PPOConfig,
    Field(discriminator="name"),
]


class OwnAnswersConfig(LossSection):
    """When the model answers questions of the calibration split, for penalties that read its own graded answers.

    All such penalties of a run share one stream of answers, so these keys must be the same in each.
    """

    name: str
    refresh_every: Count = 50
    """Optimiser steps between two rounds of answering."""
    questions_per_refresh: Count = 512
    """Questions answered in one round, at most the calibration split."""
    answers_per_step: Count = 16
    """Graded answers that enter one optimiser step over all ranks."""


class AnswerScoreConfig(OwnAnswersConfig):
    """Proper score of the likelihood of the model's own graded answers, as a penalty (docs/calibration-term.md).

    With `moves: scale` there is one more round of answering after the last step. With `moves: all` beside grpo, rloo or ppo
    the answers are those that these sample and grade anyway; refresh_every and its like are not read.
    """

    name: Literal["answer_score"] = "answer_score"
    moves: Literal["scale", "all"] = "scale"
    """`scale`: the score is minimised exactly, over the logit scale alone, which cannot memorise the questions; `all`:
    its gradient enters the loss and moves every trained weight."""
    score: Literal["log", "brier"] = "log"
    """`log`: binary cross-entropy of the answer's likelihood against right or wrong; `brier`: squared error."""
    weight: Weight = 1.0
    """Of the term in the loss, with `all`."""


class TokenBrierConfig(LossSection):
    """Brier score of every next-token distribution (Brier 1950)."""

    name: Literal["token_brier"] = "token_brier"
    weight: Weight = 1.0
    """Of the term in the loss."""


class ConfidencePenaltyConfig(LossSection):
    """Negative entropy of the next-token distributions (Pereyra et al. 2017, arXiv 1701.06548)."""

    name: Literal["confidence_penalty"] = "confidence_penalty"
    weight: Weight = 0.1
    """The paper's beta."""


class TokenizedBrierConfig(OwnAnswersConfig):
    """Brier score of a confidence that the model states in one token (ConfTuner, arXiv 2508.18847)."""

    name: Literal["tokenized_brier"] = "tokenized_brier"
    levels: Annotated[tuple[str, ...], Field(min_length=2)] = tuple("0123456789")
    """What it may answer, from no to full confidence, each a single token."""
    weight: Weight = 1.0
    """Of the term in the loss."""


class CorrectnessQueryConfig(OwnAnswersConfig):
    """Whether the proposed answer is correct, asked of the model (calibration-tuning, arXiv 2406.08391)."""

    name: Literal["correctness_query"] = "correctness_query"
    choices: tuple[str, str] = ("i", "ii")
    """Names of the choices no and yes, each a single token."""
    weight: Weight = 1.0
    """Of the term in the loss."""


class DivergenceAnchorConfig(LossSection):
    """Divergence from the starting model on the completions of the training data (arXiv 2406.08391)."""

    name: Literal["divergence_anchor"] = "divergence_anchor"
    NEEDS: ClassVar = Needs(reference="log-probs")
    weight: Weight = 1.0
    """The paper's kappa."""


class CalibrationAwareConfig(OwnAnswersConfig):
    """Confidence pulled to the accuracy that held-out answers of that confidence had (RCFT, arXiv 2505.01997).

    Half of each round's questions are held out for measuring it; the other half enters the loss.
    """

    name: Literal["calibration_aware"] = "calibration_aware"
    weight: Weight = 1.0
    """Of the term in the loss."""


class MMCEConfig(OwnAnswersConfig):
    """Maximum mean calibration error of own answers against a memory bank (Kumar, Sarawagi, Jain 2018, ICML)."""

    name: Literal["mmce"] = "mmce"
    weight: Weight = 1.0
    """Of the term in the loss."""
    width: Positive = 0.4
    """Of the Laplace kernel."""
    bank_size: Count = 512
    """Answers of earlier steps to compare with."""


class SoftBinnedECEConfig(OwnAnswersConfig):
    """Soft-binned ECE of own answers, squared, against a memory bank (Karandikar et al. 2021, arXiv 2108.00106)."""

    name: Literal["soft_binned_ece"] = "soft_binned_ece"
    weight: Weight = 1.0
    """Of the term in the loss."""
    bins: Count = 15
    """Number of bins."""
    temperature: Positive = 0.01
    """Of the membership in them."""
    bank_size: Count = 512
    """Answers of earlier steps that the bins' gaps are measured on."""


class CustomPenaltyConfig(LossSection):
    """A penalty of your own (docs/losses-in-your-trainer.md); its terms carry their weights."""

    name: Literal["custom"] = "custom"
    loss: ImportPath
    """Where it is, `my_package.my_module:MyLoss`, seen from the working directory; naming it runs its code."""
    arguments: dict[str, Any] = Field(default={})
    """Of its constructor."""


Penalty = Annotated[
    AnswerScoreConfig
    | TokenBrierConfig
    | ConfidencePenaltyConfig
    | TokenizedBrierConfig
    | CorrectnessQueryConfig
    | DivergenceAnchorConfig
    | CalibrationAwareConfig
    | MMCEConfig
    | SoftBinnedECEConfig
    | CustomPenaltyConfig,
    Field(discriminator="name"),
]


class WeightPenaltyConfig(Section):
    """A penalty on how linear layers change: a decoupled step on shards before the optimiser's (docs/forgetting.md)."""

    name: Literal["row_gram_drift", "column_gram_drift", "polar_drift", "row_stretch", "column_stretch", "angle_budget"]
    """What it forgives: `row_gram_drift` W0 R; `column_gram_drift` L W0; `polar_drift` a shared rotation of both singular
    bases and any stretch; `row_stretch` and `column_stretch` infinitesimal rotations; `angle_budget` a ball around W0."""
    weight: Weight = 100.0
    """In the unit of weight_decay: `angle_budget` with budget 0 decays weights towards where they started."""
    scale: Literal["fixed", "free"] = "fixed"
    """Of the Gram drifts: `free` also forgives a common factor of all singular values."""
    budget: Weight = 0.0
    """Of angle_budget: relative distance |W - W0| / |W0| without cost."""
    probes: int | None = Field(default=8, ge=2)
    """Random vectors per matrix and step that estimate the penalty; null computes it exactly, which costs far more."""
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the matrices that each step takes, at random, with a weight that makes up for it."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers it holds for, or all of them but the head."""

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> WeightPenaltyConfig:
        if self.scale == "free" and not self.name.endswith("gram_drift"):
            raise ValueError(f"scale: free belongs to the Gram drifts, not to {self.name}")
        if self.budget and self.name != "angle_budget":
            raise ValueError(f"budget belongs to angle_budget, not to {self.name}")
        return self

"""Reinforcement learning in the config: how the policy answers the training questions, what that earns, how it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import BelowOne, Count, Fraction, LossSection, Needs, Positive, Section, Weight
from calibtrain.config_rewards import GradeSource, ModelSource, PPOCConfig, RewardSource
from calibtrain.config_rollout_engine import RolloutEngineConfig


class RolloutsConfig(Section):
    """How the policy answers the training questions, and what its answers earn (docs/losses.md)."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled to each question, at temperature 1; they are one another's baseline."""
    steps_per_round: Count = 1
    """Mini-batches of a round, an optimiser step each; above 1 the later ones are off-policy, and clipping acts."""
    epochs: Count = 1
    """Passes over a round, each in its own order; log-probs, values and credit stay those of the time of sampling."""
    truncated: Literal["graded", "bootstrapped", "left_out", "masked"] | None = None
    """Answers cut at max_new_tokens. `graded`: the cut is the end, as in evaluation, and what stands counts; `bootstrapped`
    (ppo): they would have gone on, earn nothing, and end with the value of the state that they came to; `left_out`: nothing
    is learnt from them, and they are nobody's baseline; `masked`: the same, but their rewards count in the baseline, as in
    TRL's mask_truncated_completions. null: bootstrapped with values, else graded."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=100)] = 0
    """Up to so many times a round, groups whose answers all earn the same are thrown away and other questions asked in their
    place (DAPO: Yu et al. 2025, arXiv 2503.14476); what is still missing then is made up of the first."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weighs each token, or whole answers, by how much likelier they are to the trainer than to whoever sampled: at most
    correction_cap, or 0 beyond it, as TRL's vllm_importance_sampling_mode. Worth its pass where another engine samples."""
    correction_cap: Annotated[float, Field(ge=1)] = 3.0
    """The largest importance weight."""
    reward: Literal["accuracy", "model", "sources", "brier", "log", "ternary", "ppo_c"] = "brier"
    """`accuracy`: 1 if right; `model`: what reward_model gives; `sources`: the sum of `sources`; `brier`, `log`: a proper
    score of the confidence, and accuracy_weight times what the answer earns; `ternary`: 1 if right, 0 for an abstention, and
    a wrong answer costs so much that answering pays below abstention.target_risk; `ppo_c`: see there."""
    reward_model: str | None = None
    """A reward model that an answer earns by, in place of its grade: short for one source of kind `model` of this path."""
    sources: Annotated[tuple[RewardSource, ...], Field(min_length=1)] | None = None
    """What an answer earns: the sum of these, each with its weight; null: its grade, 1 if right, or what reward_model gives.
    One each of grade, model, format, length, function, judge, or several of a kind."""
    confidence: Literal["likelihood", "stated", "head"] = "likelihood"
    """`likelihood`: the probability of the whole answer, a function of the weights, so that its score is a term of the
    loss, answer_score; `stated`: "Confidence: 80%" behind the answer, which is sampled, so that its score is a reward;
    `head`: what confidence_head tells, so that its score is a term of the loss, and no reward."""
    accuracy_weight: Weight | None = None
    """Of being right, or of what `sources` give, in `brier` and `log`. null: 0 with `likelihood`, whose score ends at the
    truth, and with any weight here above it (docs/rewards.md); 1 with `stated` and `head`; so little that being wrong would
    pay is refused."""
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
    ppo_c: PPOCConfig = PPOCConfig()
    """With `reward: ppo_c`."""
    measure_reward_model: Annotated[int, Field(ge=0)] = 64
    """Questions of data.splits.calibration and validation by which a reward model is measured before training, in
    OUT/reward_model.json and the report: on the data's pairs, else on the policy's own right and wrong answers."""

    engine: RolloutEngineConfig = RolloutEngineConfig()
    """Who samples."""

    @model_validator(mode="before")
    @classmethod
    def _sources_are_the_reward(cls, values: Any) -> Any:
        """Who names a source and no reward means that source, not the default beside it."""
        if isinstance(values, dict) and values.get("reward") is None:
            for key, reward in _OF.items():
                if values.get(key) is not None:
                    return {**values, "reward": reward}
        return values

    @model_validator(mode="after")
    def _sources_fit(self) -> RolloutsConfig:
        named = [key for key in ("sources", "reward_model") if getattr(self, key) is not None]
        if len(named) == 2:
            raise ValueError("reward_model is short for one of the sources; name it there, and leave reward_model out")
        if self.reward == "accuracy" and named:
            raise ValueError(
                f"reward: accuracy is the grade alone; leave out {named[0]}, or set reward: {_OF[named[0]]}"
            )
        for key, reward in _OF.items():
            if self.reward == reward and key not in named:
                raise ValueError(f"reward: {reward} needs {key}")
        if self.reward == "ppo_c" and (not named or self.confidence != "stated"):
            raise ValueError("reward: ppo_c shifts what reward_model or sources give by a confidence: stated; set both")
        if named and self.rewards_nothing:
            raise ValueError(
                f"{named[0]}: earns nothing beside the score in the loss unless accuracy_weight is above 0"
            )
        if self.reward in ("model", "sources", "ppo_c") and self.accuracy_weight is not None:
            raise ValueError("accuracy_weight goes with reward: brier or log; here weigh a source of kind grade")
        self._check_all_is_read()
        if self.reward == "ternary":
            grades = [one for one in self.paid_by if isinstance(one, GradeSource)]
            if not grades or any(one.normalize or one.clip is not None for one in grades):
                raise ValueError("reward: ternary prices the grade: it needs a source of kind grade, as it is")
        return self

    def _check_all_is_read(self) -> None:
        """Raise ValueError for what is set and would change nothing."""
        scored = self.reward in ("brier", "log")
        proper = self.reward == "ppo_c" and self.ppo_c.form == "proper"
        read = {
            "accuracy_weight": (scored, "reward: brier or log; what an answer earns is weighed in sources"),
            "score_weight": (scored, "reward: brier or log"),
            "format_penalty": (
                self.scores_statement and (scored or proper),
                "a stated confidence that brier, log or ppo_c's form proper scores; else take a source of kind format",
            ),
            "target_mixing": (
                scored and self.splits_credit,
                "confidence: stated, decoupled: true and reward: brier or log",
            ),
            "abstentions": (self.reward == "ternary", "reward: ternary"),
            "ppo_c": (self.reward == "ppo_c", "reward: ppo_c"),
        }
        for key, (is_read, reader) in read.items():
            if not is_read and getattr(self, key) != type(self).model_fields[key].default:
                with_what = (
                    f"reward: {self.reward}, confidence: {self.confidence}, decoupled: {str(self.decoupled).lower()}"
                )
                raise ValueError(f"{key} goes with {reader}; with {with_what} it changes nothing: leave it out")

    @property
    def paid_by(self) -> tuple[RewardSource, ...]:
        """The sources of what an answer earns."""
        if self.sources is not None:
            return self.sources
        return (GradeSource(),) if self.reward_model is None else (ModelSource(path=self.reward_model),)

    @property
    def needs_grades(self) -> bool:
        """Whether answers that nobody can grade are of no use."""
        scored = self.reward in ("brier", "log", "ternary")
        return scored or any(isinstance(one, GradeSource) for one in self.paid_by)

    @property
    def scores_statement(self) -> bool:
        """Whether the confidence that an answer states has a score of its own."""
        return self.confidence == "stated" and self.reward in ("brier", "log", "ppo_c")

    @property
    def splits_credit(self) -> bool:
        """Whether a stated confidence's words get the credit of its score, the others that of what the answer earns."""
        return self.decoupled and self.scores_statement

    @property
    def steps_on_a_round(self) -> int:
        """Optimiser steps that learn from one round of sampling."""
        return self.steps_per_round * self.epochs

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


_OF = {"sources": "sources", "reward_model": "model"}
"""Key -> the reward that is it alone."""


class PolicyGradientConfig(LossSection):
    """What the on-policy objectives share."""

    clip_low: BelowOne = 0.2
    """The probability ratio to the policy that sampled counts down to 1 - clip_low ..."""
    clip_high: Positive = 0.2
    """... and up to 1 + clip_high."""
    beta: Weight = 0.0
    """Weight of the KL divergence from the starting model; above 0 it is kept, or LoRA's adapters are switched off."""

    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """A blamed token's ratio counts up to this (Ye et al. 2020, arXiv 1912.09729); null: without end, as in PPO."""

    NEEDS: ClassVar = Needs(data="rollouts")

    @property
    def needs(self) -> Needs:
        """Rollouts, and the starting model where the KL counts."""
        return replace(self.NEEDS, reference="live" if self.beta > 0 else "none")


class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    name: Literal["grpo"] = "grpo"
    NEEDS: ClassVar = Needs(data="rollouts", credit="group", word_credit=True)
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
    NEEDS: ClassVar = Needs(data="rollouts", credit="others", kl_in_reward=True, whole_answers=True)


class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv 1707.06347); the KL is in the reward."""

    name: Literal["ppo"] = "ppo"
    NEEDS: ClassVar = Needs(data="rollouts", module="value head", credit="values", kl_in_reward=True)
    value_model: Literal["shared", "own"] = "shared"
    """What values are read from: `shared`, the policy's own hidden states, which their loss then moves as well; `own`, a
    second model, of which as much is trained as of the policy (all, or adapters of its own), and its head."""
    value_source: Path | None = None
    """A model directory that the second model starts from, e.g. a reward model's; null: where the policy starts."""
    value_learning_rate: Positive | None = None
    """Peak of the second model's learning rate, on the policy's schedule; null: training.learning_rate. AdamW makes steps as
    long whatever value_weight says: that is the second model's part of the norm which max_grad_norm bounds, no more."""
    value_clip: Positive = 0.2
    """How far a value may move from the one at sampling before its loss stops to fall."""
    value_weight: Weight = 0.1
    """Weight of the value head's loss."""
    gamma: Fraction = 1.0
    """Discount of later rewards, per token."""
    lam: Fraction = 0.95
    """Decay of generalised advantage estimation (arXiv 1506.02438)."""

    @property
    def needs(self) -> Needs:
        """As every on-policy objective, and a second model where that is asked for."""
        needs = super().needs
        return replace(needs, module="value model") if self.value_model == "own" else needs

    @model_validator(mode="after")
    def _source_is_of_the_second_model(self) -> PPOConfig:
        for key in ("value_source", "value_learning_rate"):
            if getattr(self, key) is not None and self.value_model != "own":
                raise ValueError(f"{key} is of a second model: set value_model: own")
        return self

"""What an answer earns, in the config: the sources of its reward, one section a kind (docs/rewards.md)."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import Count, Positive, Section, Weight
from calibtrain.config_tasks import JudgeConfig


class SourceSection(Section):
    """Base of the kinds."""

    ASKED: ClassVar[bool] = True
    """Whether it is asked once an answer is sampled; else it reads what is known of each."""
    PROXY: ClassVar[bool] = False
    """Whether it stands in for being right, so that its rise is watched against the grade."""

    weight: Positive = 1.0
    """What it gives is multiplied by this."""
    normalize: bool = False
    """Less its mean and by its standard deviation over the answers of all ranks and rounds so far."""
    clip: Positive | None = None
    """Hold it within [-clip, clip], once normalised."""


class GradeSource(SourceSection):
    """1 for a right answer, 0 for a wrong one, as the task grades it; with `reward: ternary` what that gives."""

    ASKED: ClassVar = False
    kind: Literal["grade"] = "grade"

    @property
    def least_of_right(self) -> float:
        """The least by which a right answer can be worth more than a wrong one."""
        # Normalised, the two lie 1 apart where all were alike so far, else further, on both sides of 0 and with a product of
        # -1: where one is clipped as well, the other is at least 1 off.
        return self.weight * min(1.0, 1.0 if self.clip is None else self.clip)


class ModelSource(SourceSection):
    """A reward model: a sequence classifier of one label in Hugging Face form, as `calibtrain train reward_model` exports.

    It reads question and whole reply anew, by its own tokenizer and chat template, in model.dtype; its head in fp32.
    """

    PROXY: ClassVar = True
    kind: Literal["model"] = "model"
    path: str
    """A local directory (./ counts from the YAML file) or a hub name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    normalize: bool = True
    """Less its mean and by its standard deviation over the answers of all ranks and rounds so far: a reward model's unit is
    arbitrary, and other weights count in it."""
    max_length: Count = 2048
    """Tokens of a question with its reply; of a longer one the question loses its beginning."""
    batch_size: Count = 16
    """Replies scored at once on one rank."""


class FormatSource(SourceSection):
    """1 for a reply of the wanted form, 0 for another."""

    kind: Literal["format"] = "format"
    pattern: str | None = None
    """A Python regular expression that is found in the reply; null: the task finds an answer in it."""

    @model_validator(mode="after")
    def _pattern_compiles(self) -> FormatSource:
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        return self


class LengthSource(SourceSection):
    """0 up to `free` tokens, falling in a line to -1 at `full` and beyond (DAPO's soft overlong punishment, 2503.14476)."""

    ASKED: ClassVar = False
    kind: Literal["length"] = "length"
    free: Count
    """Tokens that cost nothing, the end token with them."""
    full: Count
    """Tokens from which on the cost is 1, e.g. evaluation.max_new_tokens."""

    @model_validator(mode="after")
    def _falls(self) -> LengthSource:
        if not self.free < self.full:
            raise ValueError(f"free: {self.free} must be below full: {self.full}")
        return self


class FunctionSource(SourceSection):
    """What a function of your own gives: function(questions, replies, records), three lists, returns a list of numbers.

    `records` hold what docs/tasks.md lists of a question. None or NaN is no reward: the answer counts as its group's mean.
    """

    PROXY: ClassVar = True
    kind: Literal["function"] = "function"
    function: str
    """`package.module:function`; naming it runs its code."""


class JudgeSource(SourceSection):
    """1 for a reply that a model behind an OpenAI-compatible address calls right, 0 for one that it calls wrong."""

    PROXY: ClassVar = True
    kind: Literal["judge"] = "judge"
    judge: JudgeConfig
    """Who is asked; the reply goes there whole."""


RewardSource = Annotated[
    GradeSource | ModelSource | FormatSource | LengthSource | FunctionSource | JudgeSource, Field(discriminator="kind")
]
"""Every kind; `kind` says which."""


class PPOCConfig(Section):
    """How a stated confidence shifts the reward in `reward: ppo_c` (Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724)."""

    form: Literal["proper", "threshold", "difference"] = "proper"
    """`threshold`, `difference`: as published, linear in the confidence, so that training ends at stating 0 or 1; `proper`:
    a squared score against whether the reward is above the threshold, which ends at the truth."""
    weight: Weight = 0.5
    """Of the shift."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the last round in the threshold, the running mean of the rewards of all ranks; the first round is its own."""
    scale: Positive | None = None
    """With `proper`: score against sigmoid(scale * (reward - threshold)), the probability of a Bradley-Terry model; null:
    against 0 or 1. OUT/reward_model.json has a fitted one, of a model's scores as they are: with normalize: false."""

    @model_validator(mode="after")
    def _scale_is_of_the_proper_form(self) -> PPOCConfig:
        if self.scale is not None and self.form != "proper":
            raise ValueError(f"scale goes with form: proper, not {self.form}")
        return self

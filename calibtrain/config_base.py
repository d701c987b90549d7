"""What every section of the config is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Risk = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Amount = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loss needs of the run: all that pipeline and loop ask of an objective, whatever its name."""

    data: Literal["records", "pairs", "unpaired", "rollouts", "relabelled"] = "records"
    """`records`: answers to learn; `pairs`: chosen and rejected ones; `unpaired`: answers that are desirable or not;
    `rollouts`: answers sampled and graded while training; `relabelled`: records labelled anew by the model's answers."""
    module: Literal["plain", "reward head", "value head", "value model"] = "plain"
    """Beside the language model: a reward of each sequence in place of its head; a value of each state, read from its own
    hidden states, or by a model of its own."""
    reference: Literal["none", "log-probs", "live"] = "none"
    """The starting model: not at all, by the log-probs of the training data, measured once, or on new answers."""
    statements: Literal["none", "added", "alone"] = "none"
    """Pairs that state a confidence, beside the pairs or in their place."""
    word_credit: bool = False
    """Whether each word of a sampled answer may have its own credit."""
    weighs: bool = False
    """Whether it counts each record by its weight."""
    credit: Literal["none", "group", "others", "values"] = "none"
    """What a sampled answer's reward is compared with: its group's mean, that of the others in it, or a state's value."""
    kl_in_reward: bool = False
    """Whether the KL from the starting model is paid for in the reward, not in the loss."""
    whole_answers: bool = False
    """Whether one probability ratio stands for a whole sampled answer."""

    @property
    def answers_itself(self) -> bool:
        """Whether the model trains on its own answers, so that the records bring questions alone."""
        return self.data in ("rollouts", "relabelled")

    @property
    def preferences(self) -> bool:
        """Whether it learns from answers to avoid as well."""
        return self.data in ("pairs", "unpaired")

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be passed once for its answers. A reward reads the last token, which then is not passed."""
        return self.data in ("pairs", "rollouts") and self.module != "reward head"


class LossSection(Section):
    """A loss of the config; a subclass declares its needs here, or overrides `needs` where they depend on its keys."""

    NEEDS: ClassVar[Needs] = Needs()

    @property
    def needs(self) -> Needs:
        """What it needs of the run."""
        return self.NEEDS

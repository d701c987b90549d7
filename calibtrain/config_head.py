"""The confidence head in the config: a small network that learns, beside the model, when the model's answers are right."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calibtrain.config_base import Count, Positive, Weight
from calibtrain.config_losses import OwnAnswersConfig


class ConfidenceHeadConfig(OwnAnswersConfig):
    """A head on hidden states and likelihood that tells how likely an answer is right (docs/confidence-head.md).

    It is trained on the model's own graded answers: beside grpo, rloo and ppo on those that are sampled and graded anyway,
    else on questions of the calibration split that are answered along the run. After the last step the final weights answer
    the calibration split once more, and the head is solved for on these answers.
    """

    name: Literal["confidence_head"] = "confidence_head"
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Hidden states that it reads: 0 the embeddings, k the output of block k; null: four, evenly spread."""
    score: Literal["log", "brier"] = "log"
    """Proper score that trains it; with rollouts.confidence: head it is rollouts.reward."""
    weight: Weight = 1.0
    """Of that score in the loss; with rollouts.confidence: head it is rollouts.score_weight. 0: nothing is answered for it
    along the run, and it is solved for after the last step alone, which is as good and cheaper."""
    learning_rate: Positive = 1e-3
    """Peak of the head's own learning rate, on the schedule of training.learning_rate."""
    trains_backbone: bool = False
    """Beside grpo, rloo and ppo: let the score's gradient through to the model. Off, the model trains as without the head,
    and the head follows it; on, the model may trade being right for being easy to tell."""
    fit_questions: Count = 4096
    """Most questions answered after the last step: the calibration split, then training questions that no step learnt
    from, also those beyond data.splits.train, then what of the calibration questions data.splits does not ask for."""
    serves: Literal["auto", "never"] = "auto"
    """auto: its confidence is the run's, wherever no --source is named, if it tells right from wrong better than the
    likelihood on its own questions by cross-validation; never: it is one that is asked for by --source head."""

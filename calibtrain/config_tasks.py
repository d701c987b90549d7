"""The task in the config: what an answer is and when it is right, one section a kind (docs/tasks.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import Section


class TaskSection(Section):
    """Base of the kinds."""

    TOKENS: ClassVar[int] = 12
    """evaluation.max_new_tokens where the config does not say it."""


class ShortAnswerTask(TaskSection):
    """A few words on one line, compared as a whole with the accepted answers."""

    kind: Literal["short_answer"] = "short_answer"
    match: Literal["normalized_match", "exact_match"] = "normalized_match"
    """`normalized_match` ignores case, accents, punctuation and a leading "the"."""


class ChoiceTask(TaskSection):
    """One of the options that a question brings (data.source.columns: options)."""

    TOKENS: ClassVar[int] = 32

    kind: Literal["choice"] = "choice"
    show: Literal["letters", "texts"] = "letters"
    """What a reply is: the letter of an option, which the question then lists ("B"), or an option's text."""
    answer_by: Literal["likelihood", "generation"] = "likelihood"
    """`likelihood`: every option is scored and the likeliest is the answer, its confidence the softmax over the options;
    `generation`: the reply is written freely, with the options in the question, and read."""
    score: Literal["sum", "mean"] = "sum"
    """Of a text's token log-probs, its end token with them; `mean` does not punish long options. A letter is one token."""
    shuffle: bool = False
    """Order the options anew for each question, always the same for the same question, so that no place has the answer."""
    answers_are: Literal["text_or_letter", "text", "letter", "index_from_0", "index_from_1"] = "text_or_letter"
    """How the data names the right option: by its text, its letter in the order of the data, or its place, counted from 0
    (MMLU, HellaSwag) or from 1 (ARC's "1" to "4", WinoGrande); where it counts, a letter is read too."""


class LabelTask(TaskSection):
    """One of a fixed set of class names."""

    kind: Literal["label"] = "label"
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    """The classes, as the data and the replies name them."""
    instruction: str | None = "Answer with one of: {labels}."
    """A line put behind every question, {labels} being their names; null leaves the question as it is."""
    answer_by: Literal["likelihood", "generation"] = "likelihood"
    """`likelihood`: every class is scored and the likeliest is the answer, its confidence the softmax over the classes;
    `generation`: the reply is written freely and read."""
    score: Literal["sum", "mean"] = "sum"
    """Of a name's token log-probs, its end token with them; `mean` does not punish long names."""

    @model_validator(mode="after")
    def _names_apart(self) -> LabelTask:
        names = [name.strip() for name in self.labels]
        if not all(names) or len(set(names)) < len(names) or any("\n" in name for name in names):
            raise ValueError(f"labels: each must be a name of its own on one line, got {list(self.labels)}")
        self.__dict__["labels"] = tuple(names)
        if self.instruction is not None and ("\n" in self.instruction or not self.instruction.strip()):
            raise ValueError("instruction: one line of text, or null")
        return self


TaskConfig = Annotated[ShortAnswerTask | ChoiceTask | LabelTask, Field(discriminator="kind")]
"""Every kind; `kind` says which."""

"""The task in the config: what an answer is and when it is right, one section a kind (docs/tasks.md)."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import BelowOne, Count, Positive, Section, Weight

Bound = Annotated[float, Field(gt=0, le=1)]


class TaskSection(Section):
    """Base of the kinds."""

    TOKENS: ClassVar[int] = 12
    """evaluation.max_new_tokens where the config does not say it."""

    def grades_by(self) -> dict[str, Any]:
        """What of it answers and grades depend on, as plain values: a calibration holds for these."""
        return self.model_dump(mode="json")


class ShortAnswerTask(TaskSection):
    """A few words, compared with the accepted answers."""

    kind: Literal["short_answer"] = "short_answer"
    match: Literal["normalized_match", "exact_match", "contains", "regex", "token_f1"] = "normalized_match"
    """`normalized_match` ignores case, accents, punctuation and a leading "the"; `contains` does so too and wants an
    accepted answer's words in a row anywhere in the reply; `regex` takes accepted answers as Python patterns of the
    whole reply; `token_f1` is SQuAD's word overlap."""
    f1: Bound | None = None
    """With `token_f1`: the least F1 of a right answer."""
    lines: Literal["one", "many"] = "one"
    """Whether a reply ends at its first line break."""

    @model_validator(mode="after")
    def _bound_goes_with_f1(self) -> ShortAnswerTask:
        if (self.match == "token_f1") != (self.f1 is not None):
            raise ValueError("match: token_f1 and `f1`, the least F1 of a right answer, go together")
        return self


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


Place = Literal["boxed", "hashes", "answer_is", "last_number", "pattern"]


class FinalAnswerSection(TaskSection):
    """Base of the kinds whose answer is the end of a reasoning of several lines."""

    TOKENS: ClassVar[int] = 512

    answer_in: Annotated[tuple[Place, ...], Field(min_length=1)] = ("boxed", "hashes", "answer_is", "last_number")
    """Where the final answer is looked for, the first that is there: `boxed` the last \\boxed{...}, `hashes` behind the last
    ####, `answer_is` behind the last "answer is" or "answer:", `last_number` of the reply, `pattern` your own."""
    pattern: str | None = None
    """A Python regular expression with one group, which holds the answer; its last match in the reply counts."""

    @model_validator(mode="before")
    @classmethod
    def _pattern_alone(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pattern") is not None and "answer_in" not in values:
            return {**values, "answer_in": ["pattern"]}
        return values

    @model_validator(mode="after")
    def _pattern_compiles(self) -> FinalAnswerSection:
        if ("pattern" in self.answer_in) != (self.pattern is not None):
            raise ValueError("`pattern` and answer_in: [..., pattern] go together")
        if len(set(self.answer_in)) != len(self.answer_in):
            raise ValueError("answer_in names a place twice")
        if self.pattern is None:
            return self
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"pattern: {self.pattern!r} has {groups} groups; it needs one, which holds the answer")
        return self


class NumberTask(FinalAnswerSection):
    """A number, mostly at the end of a reasoning; accepted answers may be numbers or full solutions (GSM8K)."""

    TOKENS: ClassVar[int] = 256

    kind: Literal["number"] = "number"
    percent: Literal["number", "hundredth"] = "number"
    """What 50% is: 50, or 0.5."""
    decimal: Literal["point", "comma"] = "point"
    """What stands before decimals: 3.5 or 3,5. The other one, and spaces, may stand between groups of three digits."""
    rel: Weight = 0.0
    """A number is right where it differs from an accepted one by at most so large a share of that, or by at most `abs`."""
    abs: Weight = 0.0
    """See `rel`; with both at 0 it must be the same number, however it is written."""


class MathTask(FinalAnswerSection):
    """A mathematical expression at the end of a reasoning, equal to an accepted one by math-verify (extra `tasks`)."""

    kind: Literal["math"] = "math"
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """A comparison that takes longer counts as unequal."""


with warnings.catch_warnings():
    # `schema` is what people call it; pydantic's own of that name is deprecated and used nowhere here.
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class JsonTask(TaskSection):
        """JSON of a schema, or a tool call: each of its values is right or wrong by itself, and has its own confidence."""

        TOKENS: ClassVar[int] = 128
        kind: Literal["json"]
        schema: dict[str, Any] | None = None  # type: ignore[assignment]
        """JSON Schema (2020-12) of an answer, or with `tool` of a call's arguments; its references stay within it."""
        schema_file: Path | None = None
        """File that holds the schema, in its place."""
        match: Literal["normalized_match", "exact_match"] = "normalized_match"
        """How texts are compared; numbers are compared as numbers, and nothing else is equal to a number."""
        compare: tuple[str, ...] | None = None
        """Fields that decide whether an answer is right, as `name` or `address.city`, `stops[].name`; null: all of them."""
        unordered: tuple[str, ...] = ()
        """Arrays whose order does not matter, as `tags` or `stops[].tags`."""
        tool: bool = False
        """Whether an answer calls a tool: {"name": ..., "arguments": {...}}, alone or within <tool_call>."""
        tools: str = "tools"
        """With `tool`: the column, one of data.source.columns.fields, that may hold a question's tool definitions."""

        @model_validator(mode="after")
        def _one_schema(self) -> JsonTask:
            if self.schema is not None and self.schema_file is not None:
                raise ValueError("schema and schema_file exclude each other; leave one of them out")
            if self.schema is None and self.schema_file is None and not self.tool:
                raise ValueError(
                    "kind: json needs a schema: write it under `schema`, or name its file as `schema_file`"
                )
            return self


class ClaimsTask(TaskSection):
    """A paragraph of claims, each right or wrong by itself; those in doubt are withheld one by one."""

    TOKENS: ClassVar[int] = 192
    kind: Literal["claims"]
    split: str = "sentences"
    """`sentences`, or `package.module:function`: text -> list of str, pieces of the text in its order."""
    match: Literal["normalized_match", "exact_match"] = "normalized_match"
    """How a claim is compared with the sentences of the accepted answers, one of which it must be as a whole."""
    grader: str | None = None
    """`package.module:function` in place of `match`: (claim, record as a mapping) -> True, False, or None for unknown."""


class CustomTask(TaskSection):
    """Answers are found and graded by functions of the user's; what they are told of a question, docs/tasks.md lists."""

    TOKENS: ClassVar[int] = 64

    kind: Literal["custom"]
    grader: str
    """`package.module:function`, called as grader(answer, record): True, False, or None where it cannot be told."""
    extractor: str | None = None
    """`package.module:function`, called as extractor(reply): the answer, its (start, stop), or None; null takes all."""
    lines: Literal["one", "many"] = "one"
    """Whether a reply ends with its first line."""
    needs_answers: bool = True
    """Whether only questions with accepted answers can be graded."""


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible address that says whether an answer is right, at temperature 0.

    A key goes into the environment variable CALIBTRAIN_JUDGE_KEY. Replies are kept in the cache, so that nothing is asked
    twice.
    """

    url: str
    """Base URL, such as http://127.0.0.1:8000/v1; questions and answers are sent there."""
    model: str
    """The judge's id on that server."""
    prompt: str | None = None
    """Jinja template of `question`, `answer` (fenced as the text to grade), `accepted` and `fields`; null: ours."""
    verdict_pattern: str | None = None
    """Regular expression whose group `verdict` holds right, correct, yes, true or their opposites; null: the last line."""
    verdict_key: str | None = None
    """The reply is a JSON object, and this key of it the verdict: true, false or such a word."""
    max_tokens: Count = 256
    """Of one reply of the judge's."""
    timeout: Positive = 120.0
    """Seconds that one reply may take."""
    at_once: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at a time."""
    unread_at_most: BelowOne = 0.05
    """Share of replies without a readable verdict, above which nothing is taken from the judge."""


class JudgeTask(TaskSection):
    """Answers in free words, graded by another model, whose errors an audited sample measures (docs/tasks.md)."""

    TOKENS: ClassVar[int] = 64

    kind: Literal["judge"]
    judge: JudgeConfig
    """Who grades."""
    lines: Literal["one", "many"] = "one"
    """Whether a reply ends with its first line."""
    needs_answers: bool = False
    """Whether only questions with accepted answers, which the judge is then shown, can be graded."""

    def grades_by(self) -> dict[str, Any]:
        """The same without where and how fast the judge is asked: it may move."""
        return self.model_dump(mode="json", exclude={"judge": {"url", "timeout", "at_once", "unread_at_most"}})


TaskConfig = Annotated[
    ShortAnswerTask | ChoiceTask | LabelTask | NumberTask | MathTask | JsonTask | ClaimsTask | CustomTask | JudgeTask,
    Field(discriminator="kind"),
]
"""Every kind; `kind` says which."""

"""The task in the config: what an answer is and when it is right, one section a kind (docs/tasks.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from calibtrain.config_base import BelowOne, Count, Positive, Section


class TaskSection(Section):
    """Base of the kinds."""

    TOKENS: ClassVar[int] = 12
    """evaluation.max_new_tokens where the config does not say it."""


class ShortAnswerTask(TaskSection):
    """A few words on one line, compared as a whole with the accepted answers."""

    kind: Literal["short_answer"] = "short_answer"
    match: Literal["normalized_match", "exact_match"] = "normalized_match"
    """`normalized_match` ignores case, accents, punctuation and a leading "the"."""


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


TaskConfig = Annotated[ShortAnswerTask | CustomTask | JudgeTask, Field(discriminator="kind")]
"""Every kind; `kind` says which."""

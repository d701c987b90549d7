"""One row of a data set, whatever its shape, as a Record.

Recognised shapes (extra columns are left alone):
    question, answers                       graded question; the first answer is the one to learn
    prompt, completion                      supervised fine-tuning, of strings or of chat messages
    prompt, chosen, rejected                preference pair, of strings or of chat messages
    chosen, rejected                        the same with the prompt in both: chat messages, or HH-RLHF's text
    prompt, completion, label               unpaired preference: whether the completion is desirable
    messages                                conversation (OpenAI), with tools, tool calls and their results
    conversations                           ShareGPT's and LLaMA-Factory's; also with chosen and rejected, or kto_tag
    instruction, input, output              Alpaca's, with system and history; also with chosen, rejected or answers
    text                                    to be learned as it stands
`label` (true or false) is read where it is mapped, or an objective asks for it, and is left alone elsewhere.
A question alone serves where the model answers it itself and nobody grades it (a reward model in `rollouts`).
`answers` may stand beside any of them and makes the row gradable. `question` and `prompt` mean the same.

A conversation teaches each of the assistant's turns, a graded or labelled one and a pair the last alone.

Text is text, whatever it looks like. An object that is to be learned is its JSON, and so is an accepted answer where the
task takes objects; elsewhere {value, aliases} (TriviaQA) are its texts. CSV alone has no other way to
hold a list: there a cell that is a JSON list of messages, or of answers, is that list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibtrain.data.cells import (
    answers_of,
    desirable,
    name_of,
    opened,
    option_texts,
    options_in,
    passages_of,
    weight_of,
)
from calibtrain.data.layout import ALPACA, FIELDS, SHAPES, Layout
from calibtrain.data.messages import hh_turns, hushed, tools_of, turns_of
from calibtrain.data.strata import strata_of
from calibtrain.data.values import missing, plain, unreadable
from calibtrain.errors import UserError, printable, short
from calibtrain.records import Message, Record

_PREFERENCE_NEEDS_BOTH = "`rejected` stands without `chosen`: a preference pair needs both"


@dataclass(frozen=True, slots=True)
class _Said:
    """What a row's columns say together."""

    prompt: tuple[Message, ...]
    chosen: Message | None = None
    rejected: Message | None = None
    learned: tuple[int, ...] = ()  # turns of the assistant, counted from the first turn


def record_from_row(
    row: Mapping[str, Any], layout: Layout, place: str, passed_over: Counter[str] | None = None
) -> Record:
    """Record of one row; `place` ("file.jsonl:17") names it in messages. Raises UserError for one that cannot serve.

    `passed_over` counts the columns that hold something which another column was read for.
    """
    values = {field: plain(row.get(layout.columns[field])) for field in layout.columns}
    values = {field: None if missing(value) else value for field, value in values.items()}
    accepted = answers_of(values.pop("answers", None), layout.cells, place, objects=layout.objects)
    options = answers_of(option_texts(values.pop("options", None)), layout.cells, place, "options")
    options += options_in({column: plain(row.get(column)) for column in layout.options}, place)
    context = passages_of({column: row.get(column) for column in layout.context}, layout.cells, place)
    weight, name = weight_of(values.pop("weight", None), place), name_of(values.pop("id", None), place)
    label, tools = values.pop("label", None), values.pop("tools", None)
    found = {field: opened(value, field, layout.cells, place) for field, value in values.items()}
    fields = {field: found.get(field) for field in (*FIELDS, *ALPACA)}
    over = _passed_over(fields, layout, place)
    fields |= dict.fromkeys(over)
    said = _said(fields, place)
    if passed_over is not None:
        passed_over.update(layout.columns[field] for field in over)
    if not ("tools" in layout.mapped or any(isinstance(value, list) for value in found.values())):
        tools = None  # of plain questions: some other column of that name
    chosen, rejected = said.chosen, said.rejected
    if "label" in layout.columns and chosen is not None and rejected is None and not desirable(label, place):
        chosen, rejected = None, chosen
    elif chosen is None and accepted:
        chosen = Message("assistant", accepted[0])
    if chosen is None and rejected is None and not layout.bare:
        raise UserError(f"{place}: the row has no answer ({SHAPES})")
    if rejected is not None and rejected.tool_calls:
        raise UserError(f"{place}: the rejected answer calls a tool; pairs and labelled answers are of text")
    if chosen is not None and chosen.tool_calls and (rejected is not None or "label" in layout.columns):
        raise UserError(f"{place}: the chosen answer calls a tool; pairs and labelled answers are of text")
    # A graded or labelled answer is the last one.
    last_alone = accepted or rejected is not None or "label" in layout.columns
    record = Record(
        said.prompt,
        None if chosen is None else chosen.content,
        None if rejected is None else rejected.content,
        accepted,
        strata_of(row, layout.strata, place),
        place,
        options=options,
        context=context,
        fields={column: plain(row.get(column)) for column in layout.fields},
        weight=weight,
        name=name,
        tools=tools_of(tools, place),
        calls=() if chosen is None else chosen.tool_calls,
        learned=() if last_alone else tuple(i - len(said.prompt) - 1 for i in said.learned),
    )
    _check_texts(record, place)
    return record


def _check_texts(record: Record, place: str) -> None:
    for name, text in (("answer", record.chosen), ("rejected answer", record.rejected)):
        if text is not None and not text.strip() and not (name == "answer" and record.calls):
            raise UserError(f"{place}: the {name} is empty")
    if record.prompt and record.prompt[-1].role == "user" and not record.question.strip():
        raise UserError(f"{place}: the question is empty")
    _check_characters(record)


def _check_characters(record: Record) -> None:
    texts = [("prompt", message.content) for message in record.prompt]
    texts += [("answer", record.chosen or ""), ("rejected answer", record.rejected or "")]
    texts += [("tool call", call.arguments + call.name) for turn in record.turns for call in turn.tool_calls]
    texts += [("tools", record.tools)]
    texts += [("accepted answer", text) for text in record.accepted]
    texts += [("option", text) for text in record.options]
    texts += [("context", text) for text in record.context]
    texts += [(f"stratum {printable(key)!r}", text) for key, text in record.strata.items()]
    for name, text in texts:
        if not text.isascii() and (half := unreadable(text)):
            raise UserError(
                f"{record.origin}: the {name} holds {half}, half of a character (a lone surrogate), which no tokenizer "
                "can read; the text was cut inside an emoji: mend or drop the row"
            )


def _passed_over(values: Mapping[str, Any], layout: Layout, place: str) -> set[str]:
    """Fields that hold something, and that another one is read for. Raises UserError where both are mapped."""
    held = {field for field, value in values.items() if value is not None}
    over = {"question"} if "prompt" in held else set()
    asked = held & {"prompt", "question"}
    whole = "messages" in held and not ("chosen" in held and not asked and _unanswered(values, place))
    if whole and "messages" in layout.mapped and "chosen" not in layout.mapped:
        over |= {"chosen", "rejected"}
    if "chosen" in held - over:
        over |= {"completion", "text"} | ({"messages"} if whole else set())
    elif "completion" in held:
        over |= {"messages", "text"}
    elif "messages" in held:
        over |= {"prompt", "question", "text"}
    elif "text" in held:
        over |= {"prompt", "question"}
    over &= held
    if lost := sorted(over & layout.mapped):
        raise UserError(
            f"{place}: columns maps {lost[0]!r}, and also a field that is read in its place, and the row holds both; map one"
        )
    return over


def _said(values: Mapping[str, Any], place: str) -> _Said:
    """Prompt, chosen and rejected answer, the latter two None where the row has none."""
    prompt = _prompt(values, place)
    if values["rejected"] is not None and values["chosen"] is None:
        raise UserError(f"{place}: {_PREFERENCE_NEEDS_BOTH}")
    if values["chosen"] is not None:
        return _preference(values, prompt or _unanswered(values, place), place)
    if values["completion"] is not None:
        completion = _split_answer(values["completion"], prompt, "completion", place)
        # Alpaca's earlier answers are learned as well, as LLaMA-Factory does.
        earlier = _assistant(completion.prompt) if values["history"] is not None else completion.learned
        learned = (*earlier, len(completion.prompt)) if earlier else ()
        return replace(completion, prompt=_asking(completion.prompt, place), learned=learned)
    if values["messages"] is not None:
        return _conversation(values, place)
    if values["text"] is not None:
        if not isinstance(values["text"], str):
            raise UserError(f"{place}: text must be text, not {short(values['text'])}")
        return _Said((), Message("assistant", values["text"]))
    return _Said(_asking(prompt, place))


def _preference(values: Mapping[str, Any], prompt: tuple[Message, ...], place: str) -> _Said:
    texts = {name: values[name] for name in ("chosen", "rejected")}
    if not prompt and all(text is None or hh_turns(text) for text in texts.values()):
        texts = {name: hh_turns(text) for name, text in texts.items()}
    chosen = _split_answer(texts["chosen"], prompt, "chosen", place)
    if texts["rejected"] is None:
        return replace(chosen, prompt=_asking(chosen.prompt, place), learned=())
    rejected = _split_answer(texts["rejected"], prompt, "rejected", place)
    if chosen.prompt != rejected.prompt:
        raise UserError(f"{place}: chosen and rejected answer different prompts")
    return _Said(_asking(chosen.prompt, place), chosen.chosen, rejected.chosen)


def _conversation(values: Mapping[str, Any], place: str) -> _Said:
    """The turns up to the last one of the assistant that is to be learned."""
    turns = turns_of(values["messages"], "messages", place)
    learned = [i for i in _assistant(turns) if i not in hushed(values["messages"])]
    if not learned:
        told = "none that is trained (weight or train is 0)" if _assistant(turns) else "no assistant turn"
        raise UserError(f"{place}: messages has {told}, so no answer")
    first = _system(values, place) if turns[0].role != "system" else []
    turns = (*first, *turns[: learned[-1] + 1])
    learned = [i + len(first) for i in learned]
    # What is said before anybody asked is no answer.
    asked = next((i for i, turn in enumerate(turns) if turn.role in ("user", "tool")), len(turns))
    return _Said(_asking(turns[:-1], place), turns[-1], learned=tuple(i for i in learned if i > asked))


def _unanswered(values: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """The conversation that LLaMA-Factory's `chosen` and `rejected` answer; () where there is none, or it is a whole one."""
    if values["messages"] is None:
        return ()
    turns = turns_of(values["messages"], "messages", place)
    if turns[-1].role == "assistant":
        return ()
    return (*(_system(values, place) if turns[0].role != "system" else ()), *turns)


def _assistant(turns: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(i for i, turn in enumerate(turns) if turn.role == "assistant")


def _prompt(values: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Turns of the prompt or question column; Alpaca's system, history and input stand around its instruction."""
    question = values["question"] if values["prompt"] is None else values["prompt"]
    question_input = values["input"]
    if question_input is not None:
        if not isinstance(question_input, str) or not isinstance(question or "", str):
            raise UserError(f"{place}: input is added to the instruction: both must be text")
        if question_input.strip():
            question = f"{question}\n{question_input}" if question else question_input
    prompt = () if question is None else turns_of(question, "prompt", place)
    return (*_earlier(values, place), *prompt) if prompt else ()


def _earlier(values: Mapping[str, Any], place: str) -> list[Message]:
    turns = _system(values, place)
    history = values["history"]
    if history is None:
        return turns
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{place}: history is a list of [question, answer] pairs of text, got {short(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _system(values: Mapping[str, Any], place: str) -> list[Message]:
    system = values["system"]
    if system is None:
        return []
    if not isinstance(system, str):
        raise UserError(f"{place}: system must be text, not {type(system).__name__}")
    return [Message("system", system)]


def _split_answer(value: Any, prompt: tuple[Message, ...], name: str, place: str) -> _Said:
    """Prompt and answer of a string, of the assistant's turns, or of a whole conversation that repeats the prompt."""
    if isinstance(value, str):
        return _Said(prompt, Message("assistant", value))
    turns = turns_of(value, name, place)
    if turns[-1].role != "assistant":
        raise UserError(f"{place}: {name} ends with a {turns[-1].role} turn; its last message must be the assistant's")
    before = turns[:-1]
    if turns[0].role != "assistant":
        return _Said(before, turns[-1])
    # What opens with the assistant continues the prompt column: a call, its result and what is made of it.
    learned = tuple(len(prompt) + i for i in _assistant(before))
    return _Said((*prompt, *before), turns[-1], learned=learned)


def _asking(prompt: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    if not prompt:
        raise UserError(f"{place}: the row has no question or prompt")
    if prompt[-1].role not in ("user", "tool"):
        raise UserError(
            f"{place}: the prompt ends with a {prompt[-1].role} turn; the answer must follow a user turn or a tool's result"
        )
    return prompt

"""Messages as `plain` writes them and as a chat template takes them, and whether it wrote all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from calibtrain.data.prompts import CONTEXT
from calibtrain.errors import UserError
from calibtrain.records import Message

PLAIN_QUESTION = "Question: {}\nAnswer:"
PLAIN_ANSWER = " {}"
PLAIN_BETWEEN = "\n\n"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template puts before the tokens that the assistant generates."""


def rendered_turn(message: Message) -> dict[str, Any]:
    """The message as chat templates expect it, with its calls' arguments as objects."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            | ({"id": call.id} if call.id else {})
            for call in message.tool_calls
        ]
    return turn | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}


def check_written(text: str, messages: Sequence[Message]) -> None:
    """Raise UserError where the rendered text lacks a tool call or a tool's result: some templates pass over them."""
    for message in messages:
        if any(call.name not in text for call in message.tool_calls):
            raise UserError(
                f"data.template: the chat template writes no tool calls ({message.tool_calls[0].name!r} is missing); "
                "use a model or a template that knows them, or leave such rows out"
            )
        said = message.content.strip()
        if message.role == "tool" and said not in text and json.dumps(said)[1:-1] not in text:
            raise UserError("data.template: the chat template leaves the results of tools out; leave such rows out")


def refuse_tools(messages: Sequence[Message], tools: str) -> None:
    """Raise UserError for what `plain` has no way to write."""
    if tools or any(message.role == "tool" or message.tool_calls for message in messages):
        raise UserError("data.template: plain cannot write tools, their calls and results; use data.template: chat")


def system_merged(messages: Sequence[Message]) -> list[Message]:
    """Each system turn before the text of the user turn that follows it."""
    merged: list[Message] = []
    held = ""
    for message in messages:
        if message.role == "system":
            held += message.content.strip() + PLAIN_BETWEEN
        elif message.role == "user":
            merged.append(Message("user", held + message.content))
            held = ""
        else:
            merged.append(message)
    return merged


def plain_text(messages: Sequence[Message]) -> str:
    """A conversation as `plain` writes it."""
    parts: list[str] = []
    for message in messages:
        if message.role == "assistant":
            parts.append(PLAIN_ANSWER.format(message.content.strip()) + PLAIN_BETWEEN)
        elif message.role == "system":
            parts.append(message.content.strip() + PLAIN_BETWEEN)
        elif message.role == "context":
            parts.append(CONTEXT.format(message.content.strip()) + "\n")
        else:
            parts.append(PLAIN_QUESTION.format(message.content.strip()))
    return "".join(parts)

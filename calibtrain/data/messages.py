"""Conversations as people write them: OpenAI's messages, ShareGPT's turns, tool calls and their results, parts of text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from calibtrain.errors import UserError, short
from calibtrain.records import Message, ToolCall

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
"""Names of the speakers in OpenAI's, ShareGPT's and LLaMA-Factory's files, and ours."""
MESSAGE = "{role: system|user|assistant|tool, content: text}, or ShareGPT's {from: human|gpt|..., value: text}"
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_NOT_TRAINED = (0, False, "0", "false", "False")


def turns_of(value: Any, name: str, place: str) -> tuple[Message, ...]:
    """Messages of text (one user turn), of one message, or of a list of them, in the column `name`.

    Raises UserError for what is none, a role that nobody knows, content that is no text, and calls that cannot be read.
    """
    if isinstance(value, str) and name != "messages":
        return (Message("user", value),)
    value = [value] if _is_message(value) else value
    if not isinstance(value, list) or not value:
        kind = "a list of messages" if name == "messages" else "text or a list of messages"
        raise UserError(f"{place}: {name} must be {kind}, not {short(value)}")
    return tuple(_message(turn, name, place) for turn in value)


def hushed(value: Any) -> frozenset[int]:
    """Places in a list of messages that say themselves not to be trained: `weight: 0` (OpenAI), `train: false` (Axolotl)."""
    turns = value if isinstance(value, list) else []
    keys = ("weight", "train", "training")
    return frozenset(
        i
        for i, turn in enumerate(turns)
        if isinstance(turn, Mapping) and any(turn.get(key) is not None and turn[key] in _NOT_TRAINED for key in keys)
    )


def hh_turns(text: Any) -> list[dict[str, str]] | None:
    """Messages of a text in HH-RLHF's form, whose turns open with "Human:" or "Assistant:"; None for any other."""
    if not isinstance(text, str) or not _HH_TURN.match(text):
        return None
    parts = _HH_TURN.split(text)[1:]
    return [{"role": ROLES[role.lower()], "content": said} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def tools_of(value: Any, place: str) -> str:
    """Definitions of tools, a list of objects or its JSON text, as JSON text; "" where there are none."""
    if value is None or value == "":
        return ""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise UserError(f"{place}: tools is no JSON ({error}); it is a list of tool definitions") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{place}: tools is a list of tool definitions (objects), or its JSON text, got {short(value)}")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"role", "from"} & value.keys())


def _message(turn: Any, name: str, place: str) -> Message:
    wrong = UserError(f"{place}: each message of {name} is {MESSAGE}, got {short(turn)}")
    if not isinstance(turn, Mapping):
        raise wrong
    said, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(said, str) or said not in ROLES:
        raise wrong
    role = ROLES[said]
    if said == "function_call":
        return Message(role, "", _calls(_parsed(content, name, place), name, place))
    calls = turn.get("tool_calls")
    if calls is None and isinstance(turn.get("function_call"), Mapping):  # OpenAI's before tools
        calls = [turn["function_call"]]
    if calls is not None and not isinstance(calls, Sequence):
        raise wrong
    if calls and role != "assistant":
        raise UserError(f"{place}: a {said} message of {name} has tool_calls; only the assistant calls tools")
    if role == "tool" and isinstance(content, Mapping | list) and not _parts(content):
        content = json.dumps(content, ensure_ascii=False)  # a result that is an object
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = _joined(content, name, place)
    if not isinstance(content, str):
        raise wrong
    labels = [str(turn.get(key) or "") if role == "tool" else "" for key in ("name", "tool_call_id")]
    return Message(role, content, _calls(calls or [], name, place), *labels)


def _parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in content
    )


def _joined(parts: list[Any], name: str, place: str) -> str:
    """Text of content that is a list of parts. Raises UserError for images, sounds and files."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise UserError(f"{place}: a message of {name} has a part that is no text: {short(part)}")
        texts.append(text)
    return "".join(texts)


def _parsed(content: Any, name: str, place: str) -> list[Any]:
    """Calls of ShareGPT's function_call turn: an object or a list of them, mostly as JSON text."""
    found = content
    if isinstance(content, str):
        try:
            found = json.loads(content)
        except ValueError as error:
            raise UserError(
                f'{place}: a function_call of {name} is no JSON, {{"name": ..., "arguments": {{...}}}}: {short(content)}'
            ) from error
    return found if isinstance(found, list) else [found]


def _calls(calls: Sequence[Any], name: str, place: str) -> tuple[ToolCall, ...]:
    return tuple(_call(call, name, place) for call in calls)


def _call(call: Any, name: str, place: str) -> ToolCall:
    wrong = UserError(
        f"{place}: each call in tool_calls of {name} is {{type: function, function: {{name: text, arguments: object}}}}, "
        f"got {short(call)}"
    )
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise wrong
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise wrong from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise wrong
    return ToolCall(function["name"], json.dumps(arguments, ensure_ascii=False), str(call.get("id") or ""))

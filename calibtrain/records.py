"""The one shape every source is brought into."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant."""

    name: str
    arguments: str  # a JSON object, as text
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool (the result of a call)."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    name: str = ""  # of the tool whose result it is
    tool_call_id: str = ""  # of the call that it is the result of


@dataclass(frozen=True, slots=True)
class Record:
    """One example. A preference pair has `rejected`; a graded question has `accepted`; SFT needs only `chosen`.

    An unpaired preference has one of `chosen` and `rejected`. Text to be learned as it stands has no prompt.
    """

    prompt: tuple[Message, ...]  # ends with a user turn, or with a tool's result
    chosen: str | None = None
    rejected: str | None = None
    accepted: tuple[str, ...] = ()
    strata: Mapping[str, str] = field(default_factory=dict)  # e.g. {"continent": "Europe", "population": "100k-1M"}
    origin: str = ""  # "file.jsonl:17", for messages
    options: tuple[str, ...] = ()  # to choose the answer from
    context: tuple[str, ...] = ()  # passages to answer by
    fields: Mapping[str, Any] = field(
        default_factory=dict
    )  # columns that the task or the user's prompt reads, as they are
    weight: float = 1.0  # in training
    name: str = ""  # the user's own id
    tools: str = ""  # definitions of the tools that may be called: a JSON list, as text
    calls: tuple[ToolCall, ...] = ()  # of tools, by the chosen answer, behind its text
    # Turns of the assistant that a conversation teaches, as indices of `turns` from its end, the answer's being -1;
    # () where it is the answer alone.
    learned: tuple[int, ...] = ()
    asked_of: str = ""  # `key` of the question before its task put it in its own words (options listed in some order)

    @property
    def question(self) -> str:
        """Text of the last user turn; "" without any."""
        return next((message.content for message in reversed(self.prompt) if message.role == "user"), "")

    @property
    def turns(self) -> tuple[Message, ...]:
        """The prompt and the chosen answer."""
        return (*self.prompt, Message("assistant", self.chosen or "", self.calls))

    @property
    def id(self) -> str:
        """Hash of the prompt: the same question gives the same id in every source, split and Unicode form. 16 hex digits."""
        return self._hash(self.prompt)

    @property
    def key(self) -> str:
        """As `id`, whatever stands around the question: what decides which split it is in, and what is held out.

        The same question under another system text, or with its options in another order, has the same key; with other
        options it is another question ("Which of these is true?").
        """
        if self.asked_of:
            return self.asked_of
        stem = self._hash(tuple(message for message in self.prompt if message.role != "system"))
        if not self.options:
            return stem
        return hashlib.sha256("\x1e".join([stem, *sorted(map(_composed, self.options))]).encode()).hexdigest()[:16]

    def _hash(self, prompt: tuple[Message, ...]) -> str:
        # An accented letter written as one character or as two is one question (Unicode 15.0, NFC).
        texts = [f"{message.role}\x1f{' '.join(_composed(message.content).split())}" for message in prompt]
        # What few conversations have adds nothing to the others' ids.
        called = [
            [_composed(call.name), _composed(call.arguments)] for message in prompt for call in message.tool_calls
        ]
        if self.tools or called:
            texts.append(json.dumps([_composed(self.tools), called]))
        text = "\x1e".join(texts) if prompt else f"\x1f{_composed(str(self.chosen))}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def taught(self) -> frozenset[str]:
        """Keys of every question whose answer the record may teach: its own, and earlier ones of a conversation."""
        turns = self.turns
        earlier = (
            replace(self, prompt=turns[:place], asked_of="", options=()).key for place in self.learned if place < -1
        )
        return frozenset((self.key, *earlier))


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def unit_hash(*parts: object) -> float:
    """Number in [0, 1) that is a pure function of the parts: the same in every process, version and order. 53 bits."""
    digest = hashlib.sha256("\x1e".join(str(part) for part in parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

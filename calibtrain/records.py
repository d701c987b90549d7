"""The one shape every source is brought into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One example. A preference pair has `rejected`; a graded question has `accepted`; SFT needs only `chosen`.

    An unpaired preference has one of `chosen` and `rejected`.
    """

    prompt: tuple[Message, ...]  # ends with a user turn
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

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return self.prompt[-1].content

    @property
    def id(self) -> str:
        """Hash of the prompt: the same question gives the same id in every source and split. 16 hex digits."""
        text = "\x1e".join(f"{message.role}\x1f{' '.join(message.content.split())}" for message in self.prompt)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def unit_hash(*parts: object) -> float:
    """Number in [0, 1) that is a pure function of the parts: the same in every process, version and order. 53 bits."""
    digest = hashlib.sha256("\x1e".join(str(part) for part in parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

"""A judge's reply read as a verdict. It is untrusted text; what is not clearly one verdict is none."""

from __future__ import annotations

import json
import re
from typing import Any

from calibtrain.errors import UserError
from calibtrain.tasks.matching import without_thinking

_WORDS = re.compile(r"(?<![\w-])(not\s+)?(right|correct|yes|true|wrong|incorrect|no|false)(?![\w-])", re.IGNORECASE)
_IN_DOUBT = re.compile(
    r"n['\u2019\u02bc]t\b|\b(?:(?:is|was|are|were|do|does|did|has|ca|could|should|would|wo)nt|not|never|cannot|neither|nor|none"
    r"|nothing|nowhere|without|hardly|barely|scarcely|rarely|seldom|partly|partially|partial|half|almost|nearly|near|mostly"
    r"|largely|somewhat|unlikely|perhaps|maybe|possibly|might|far from|anything but|fails? to|failed to"
    r"|(?:would|could) (?:be|have been)|if|unless)\b"
    r"|\b(?:right|correct|true|wrong|incorrect|false)\s+\w+\s*(?::|(?:is|was|would|should|must)\b)"
    r"|\bno\s+(?!(?:it|this|that|the|not)\b)\w|\?\W*$",
    re.IGNORECASE,
)
"""Beside it a word is no verdict: it is denied, halved or supposed, or said of another ("the right answer is 5")."""
_RIGHT = frozenset({"right", "correct", "yes", "true"})
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
LONGEST = 20_000
"""Characters of a reply's end that are read."""


class Verdicts:
    """Reads replies by a pattern, by a key of a JSON object, or else by their last line. UserError for a bad pattern."""

    def __init__(self, pattern: str | None = None, key: str | None = None, section: str = "task.judge") -> None:
        self.key = key
        if pattern is not None and key is not None:
            raise UserError(f"{section}: verdict_pattern and verdict_key exclude each other; give one")
        try:
            self.pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise UserError(f"{section}.verdict_pattern: not a regular expression ({error})") from None
        if self.pattern is not None and "verdict" not in self.pattern.groupindex:
            raise UserError(f"{section}.verdict_pattern: name the group that holds the verdict: (?P<verdict>...)")

    def read(self, reply: str) -> bool | None:
        """True for right, False for wrong, None where the reply does not say one of them clearly. Never raises."""
        said = self._verdict(without_thinking(reply)[-LONGEST:])
        if isinstance(said, bool) or not isinstance(said, str):
            return said if isinstance(said, bool) else None
        said = re.sub(r"[*`]+|(?<!\w)_+|_+(?!\w)", "", said)
        if _IN_DOUBT.search(_WORDS.sub(lambda one: one[2], said)):
            return None
        found = {(word.lower() in _RIGHT) != bool(negated) for negated, word in _WORDS.findall(said)}
        return found.pop() if len(found) == 1 else None

    def _verdict(self, reply: str) -> Any:
        """What holds the verdict: text, or a value of JSON."""
        if self.key is not None:
            return _json(reply).get(self.key)
        if self.pattern is not None:
            found = list(self.pattern.finditer(reply))
            return found[-1]["verdict"] if found else None
        lines = [line for line in reply.splitlines() if line.strip(" \t*`_#.")]
        return lines[-1] if lines else None


def _json(reply: str) -> dict[str, Any]:
    """The reply's JSON object, in a fence or not; {} where there is none."""
    for text in (reply, *_FENCE.findall(reply)[-1:], reply[reply.find("{") : reply.rfind("}") + 1]):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}

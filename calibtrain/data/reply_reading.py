"""What is read in a template's replies: where one ends, where its answer begins, and the text of its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from calibtrain.data.decoding import token_texts
from calibtrain.data.rendering import PLAIN_BETWEEN, PLAIN_QUESTION
from calibtrain.tasks.matching import THINK_END, THINK_START, thinking_ends
from calibtrain.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEXT_QUESTION = PLAIN_BETWEEN + PLAIN_QUESTION.partition("{}")[0].rstrip()
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
OPENING = 16
"""Tokens that mostly tell whether a reply opens with thinking."""
SPECIAL_BETWEEN = 16
"""Special tokens that may stand within a stop without hiding it."""


class Replies:
    """The replying half of `calibtrain.data.templates.Template`, which says what they follow."""

    kind: Literal["plain", "chat", "jinja"]
    tokenizer: PreTrainedTokenizerBase
    task: Task
    end_id: int
    """Token that ends every completion."""
    _own_stops: tuple[str, ...]  # of the task and the config
    _thinks: bool  # the prompt opens a block of thinking

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The reply in generated ids: up to the first token that ends it and the first line break, stripped.

        Where the task's replies may have several lines, a line break does not end it; the first of `stops` always does. A
        block of thinking that it opens with is no part of it; one that does not end leaves an empty answer.
        """
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), len(ids))
        start = self.answer_start(ids[:end])
        if start is None:
            return ""
        text = self._decode(ids[start:end], skip_special_tokens=True)
        if start or self.kind == "chat" or self.task.several_lines:
            text = text.lstrip()  # some chat models open with a line break
        # Other separators, as U+2028, may stand in an answer of one line.
        ends = self.stops if self.task.several_lines else ("\n", *self.stops)
        found = [place for stop in ends if (place := text.find(stop)) >= 0]
        return text[: min(found, default=len(text))].strip()

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """How many of the generated ids are a block of thinking before the answer; None where it does not end."""
        opening = self._decode(ids[:OPENING]).lstrip()
        if not self._thinks and len(opening) >= len(THINK_END) and not opening.startswith((THINK_START, THINK_END)):
            return 0  # told without reading all that was said
        ends = thinking_ends(self._decode(ids), opened=self._thinks)
        if not ends:
            return ends
        low, high = 1, len(ids)  # the fewest ids whose text holds the last end
        while low < high:
            middle = (low + high) // 2
            reached = self._decode(ids[:middle]).count(THINK_END) >= ends
            low, high = (low, middle) if reached else (middle + 1, high)
        return low

    def goes_on(self, ids: Sequence[int]) -> bool:
        """Whether generated ids that came to one of `stop_ids` go on all the same: the answer is still to come."""
        if not ids or ids[-1] in self._end_ids:
            return False
        # Most candidates hold a stop's last character alone: the last tokens tell, without reading all that was said.
        reach = max((len(stop.encode()) for stop in self.stops), default=0) + SPECIAL_BETWEEN
        last = self._decode(ids[-reach:], skip_special_tokens=True)
        if not any(stop in last for stop in self.stops):
            return True
        start = self.answer_start(ids)
        if start is None:
            return True
        said = self._decode(ids[start:], skip_special_tokens=True)
        said = said.lstrip() if start or self.task.several_lines else said
        return not any(stop in said for stop in self.stops)

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Text that each generated id adds to the ones before it: `calibtrain.data.decoding.token_texts`."""
        return token_texts(list(ids), lambda some: self._decode(some, skip_special_tokens=True), self._is_byte)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which generation may stop: the ends, and every token in which one of `stops` may end."""
        if not self.stops:
            return self._end_ids
        last = {stop[-1] for stop in self.stops}
        if any(not one.isascii() for one in last):
            last.add("\N{REPLACEMENT CHARACTER}")  # a token may hold the last of its bytes alone
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        return self._end_ids | {token for token, piece in enumerate(pieces) if last & set(piece)}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a reply. A raw model that imitates examples ends its answer with a line break, not with EOS."""
        if self.kind == "chat":
            return self._own_stops
        if not self.task.several_lines:
            return ("\n", *self._own_stops)
        return (*((_NEXT_QUESTION,) if self.kind == "plain" else ()), *self._own_stops)

    @property
    def _end_ids(self) -> frozenset[int]:
        return frozenset({self.end_id, self.tokenizer.eos_token_id})

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens, clean_up_tokenization_spaces=False))

    def _is_byte(self, token: int) -> bool:
        """Whether it is a single byte of a SentencePiece vocabulary, or skipped."""
        text = str(self.tokenizer.convert_ids_to_tokens(token))
        return _BYTE_TOKEN.fullmatch(text) is not None or text in self.tokenizer.all_special_tokens

"""How a question becomes token ids and an answer comes back from them.

The boundary between prompt and completion is a boundary between tokens: the two are encoded apart and joined as ids, so
that the model is trained on exactly the prompt ids that it is asked with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from calibtrain.data.chat import PROBE_ANSWER, ChatFormat, RefusedError, special_tokens
from calibtrain.data.prompts import PROBE, Prompts, prompts_of, with_less_context
from calibtrain.data.rendering import (
    MARKS,
    PLAIN_ANSWER,
    PLAIN_BETWEEN,
    PLAIN_QUESTION,
    check_written,
    plain_text,
    refuse_tools,
)
from calibtrain.data.reply_reading import Replies
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of
from calibtrain.tasks.matching import THINK_START
from calibtrain.tasks.short_answer import SHORT_ANSWER
from calibtrain.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibtrain.config import RunConfig

_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


class InseparableError(UserError):
    """The tokenizer cannot tell an answer from its prompt."""


class Template(Replies):
    """A prompt format bound to a tokenizer.

    `plain` is "Question: ..." and "Answer:" on two lines, with completion " answer" + EOS; `chat` is the tokenizer's
    chat template with its generation prompt, and the completion ends with the token that the template puts after an
    assistant's turn. `chat_template_kwargs` go to the chat template (`enable_thinking`); `merge_system` puts a system turn
    before the first user turn's text, for templates that have no such role. `task` says what an answer is, `prompts` what
    stands around a question, `jinja` is their template; `stop` are texts that end a reply, beside the task's own. Raises
    UserError if the tokenizer has no chat template, no token that can end an answer, or none for a text of `stop`.
    """

    def __init__(
        self,
        kind: Literal["plain", "chat", "jinja"],
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        merge_system: bool = False,
        task: Task | None = None,
        stop: Sequence[str] = (),
        prompts: Prompts | None = None,
    ) -> None:
        if kind == "chat" and not tokenizer.chat_template:
            raise UserError("data.template: the tokenizer has no chat template; use data.template: plain")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no answer could end; set its eos_token")
        self.kind = kind
        self.tokenizer = tokenizer
        self._ahead: dict[str, list[int]] = {}  # ids of texts, and prompts by their record, while they are asked for
        self._rendered: dict[int, str] = {}
        self._chat = ChatFormat(tokenizer, chat_template_kwargs or {}, merge_system)
        self.task = task or SHORT_ANSWER
        self._own_stops = tuple(dict.fromkeys((*self.task.stop, *stop)))
        for text in self._own_stops:
            self._check_stop(text)
        self.prompts = prompts or Prompts()
        self._prefix_ids = self._special_prefix()
        self.end_id = tokenizer.eos_token_id
        self._lead = PLAIN_ANSWER.format("")  # whitespace between the prompt and an answer
        if kind == "chat":
            self._lead, self.end_id = self._chat.lead_and_end()
        self._probe_text = self._probe()
        self._probe_ids = self.shown_ids(self._probe_text)
        self._thinks = kind == "chat" and self._probe_text.rstrip().endswith(THINK_START)

    def prompt_text(self, record: Record, shots: Sequence[Record] = ()) -> str:
        """What the model is shown: examples with their chosen answers, then the question, up to where it answers.

        Raises UserError that names the record where the chat template refuses it.
        """
        if not shots and (known := self._rendered.get(id(record))) is not None:
            return known
        if self.kind == "jinja":
            refuse_tools(record.turns, record.tools)
            return self._own_text(record, shots)
        messages = self.prompts.turns(record, shots)
        try:
            return self._written(messages, record.tools)
        except RefusedError as error:
            raise UserError(f"{record.origin or record.question}: {error}{self._chat.remedy(messages)}") from error
        except UserError as error:
            raise UserError(f"{record.origin or record.question}: {error}") from error

    def prompt_ids(self, record: Record, shots: Sequence[Record] = ()) -> list[int]:
        """Token ids of the prompt, with the special tokens that the tokenizer or the chat template opens with, once."""
        return self.shown_ids(self.prompt_text(self.fitted(record, shots), shots))

    def fitted(self, record: Record, shots: Sequence[Record] = (), room: int | None = None) -> Record:
        """The record with as much of its context, from the start, as leaves the prompt within `room` tokens.

        By default, and at most, within what an answer leaves of max_length. Without a context it is as it was.
        """
        room = min((one for one in (room, self.prompts.room) if one is not None), default=None)
        while room is not None and record.context:
            over = len(self.shown_ids(self.prompt_text(record, shots))) - room
            if over <= 0:
                break
            *kept, last = record.context
            ids = self._encode(last)
            cut = self._decode(ids[: max(0, len(ids) - over)]).rstrip("\N{REPLACEMENT CHARACTER}")
            record = with_less_context(record, [*kept, cut] if len(cut) < len(last) else kept)
        return record

    def shown_ids(self, text: str) -> list[int]:
        """Token ids of what `prompt_text` gave."""
        ids = self._encode(text)
        return ids if self.kind == "chat" else self._prefixed(ids)  # a chat template writes its own BOS

    def _prefixed(self, ids: list[int]) -> list[int]:
        """The ids behind the tokenizer's own prefix, which the text may have written itself."""
        prefix = self._prefix_ids
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    @contextmanager
    def encoded_ahead(self, records: Sequence[Record], answers: Sequence[str]) -> Iterator[None]:
        """Within it the prompts of these records, and these answers, are known: encoded in one call, each as if alone."""
        for record in records:
            with suppress(UserError):  # told when its turn comes
                self._rendered[id(record)] = self.prompt_text(record)
        behind = [self._behind_prompt(text) for text in answers]
        texts = [*self._rendered.values(), *(self._probe_text + text for text in behind if text)]
        try:
            if texts:
                bare = {"return_attention_mask": False, "return_token_type_ids": False}
                found = self.tokenizer(texts, add_special_tokens=False, **bare)["input_ids"]
                self._ahead = dict(zip(texts, found, strict=True))
            yield
        finally:
            self._ahead, self._rendered = {}, {}

    def _own_text(self, record: Record, shots: Sequence[Record]) -> str:
        """The user's template, which shows the examples, or each of which stands before it as it was asked and answered."""
        if "examples" in self.prompts.reads:
            return self.prompts.rendered(record, shots)
        texts = [self.prompts.rendered(shot) for shot in shots]
        answered = [text + self._opened(shot.chosen or "", text) for shot, text in zip(shots, texts, strict=True)]
        return PLAIN_BETWEEN.join([*answered, self.prompts.rendered(record)])

    def _probe(self) -> str:
        """A prompt to try the tokenizer on. The user's template may refuse it, as it knows the rows; then a plain one."""
        if self.prompts.source is None:
            return self.prompt_text(replace(PROBE, context=()))
        try:
            return self.prompt_text(PROBE if "context" in self.prompts.reads else replace(PROBE, context=()))
        except UserError:
            plain = [Message("user", PROBE.question)]
            return plain_text(plain) if self.kind == "jinja" else self._chat.text(plain)

    def _opened(self, text: str, prompt: str) -> str:
        """An answer as it follows a prompt that is not a chat's: with one space, where neither has any."""
        return PLAIN_ANSWER.format(text) if text and not text[0].isspace() and not prompt[-1:].isspace() else text

    def completion_ids(self, text: str, written: bool = False) -> list[int]:
        """Token ids of an answer as they follow a prompt, and the token that ends it, once. Raises UserError if they cannot.

        The text is kept as it is, with its indentation and last line break, up to an end token of its own. `plain` puts its
        space only before a text that does not open with whitespace of its own, and leaves out blank lines before it, which
        would end the answer. So does `chat` where its template writes whitespace there. `written`: the text is the
        template's own writing already.

        An answer encoded on its own may not be what follows a prompt (a SentencePiece tokenizer opens every text with a
        space), and encoded together with the prompt it may merge with the prompt's last characters. So it is cut from
        the joint encoding where that keeps the prompt's ids, else encoded alone; either way the joined ids must decode
        to the joined text.
        """
        text = _up_to_end(self._behind_prompt(text, written), self._end_text)
        if not text:
            return [self.end_id]
        prompt, joint = self._probe_ids, self.shown_ids(self._probe_text + text)
        if joint[: len(prompt)] == prompt:  # then both decode to the same
            return _ended(joint[len(prompt) :], self.end_id)
        wanted = self._decode(joint)
        for ids in (self._encode(text), self._encode(text.removeprefix(" "))):
            if self._decode([*prompt, *ids]) == wanted:
                return _ended(ids, self.end_id)
        raise InseparableError(
            f"data.template: the tokenizer cannot split prompt and answer {text!r} into separate tokens that decode to "
            f"the same text; try data.template: {'plain' if self.kind == 'chat' else 'chat'}"
        )

    def _behind_prompt(self, text: str, written: bool = False) -> str:
        """An answer with what stands between it and its prompt."""
        if self.kind != "chat":
            return self._opened(_BLANK_LINES.sub("", text), self._probe_text)
        return text if written or not text or text[0].isspace() else self._lead + text

    def answer_text(self, record: Record) -> str:
        """What the chosen answer is written as: its text, and the calls of tools behind it, without the end token.

        Raises UserError where the template has no way to write the calls.
        """
        if not record.calls:
            return record.chosen or ""
        shown = self.prompt_text(record)
        try:
            whole = self._written(self._conversation(record), record.tools, answered=True)
        except UserError as error:
            raise UserError(f"{record.origin or record.question}: {error}") from error
        # The last end token is the answer's: what is called may hold one as text.
        said, end, _ = whole.removeprefix(shown).rpartition(self._end_text)
        if not (whole.startswith(shown) and end):
            raise UserError(
                f"{record.origin or record.question}: data.template: the chat template writes another prompt before a tool "
                "call than before an answer, so that the call cannot be learned"
            )
        return said

    def _conversation(self, record: Record) -> list[Message]:
        """All that is shown, and the answer behind it."""
        return [*self.prompts.turns(record), record.turns[-1]]

    def until_end(self, text: str, said: str) -> str:
        """The answer `said` as the text opens with it, up to the first end token; in `plain` as it is."""
        return said if self.kind == "plain" else text.partition(self._end_text)[0]

    def text_ids(self, text: str) -> tuple[list[int], int]:
        """Ids of a text that is no answer, with the tokenizer's own prefix and the EOS; and the first to be learned.

        Either stands there once, also where the text has it; white space behind an EOS is no part of it.
        """
        text = _up_to_end(text, self.tokenizer.eos_token)
        ids = _ended(self._prefixed(self._encode(text)), self.tokenizer.eos_token_id)
        return ids, max(1, len(self._prefix_ids))

    @cached_property
    def marks(self) -> bool:
        """Whether the chat template marks what the assistant generates."""
        return self.kind == "chat" and bool(MARKS.search(str(self.tokenizer.chat_template)))

    def marked_ids(self, record: Record) -> tuple[list[int], list[bool]] | None:
        """Ids of a whole conversation, and which of them the chat template marks as the assistant's; None without marks."""
        if not self.marks:
            return None
        found = self._chat.applied(
            self._conversation(record), record.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(one) for one in found["assistant_masks"]]
        return (list(found["input_ids"]), mask) if any(mask) else None

    def departure(self, record: Record) -> str | None:
        """Where prompt + completion is not what the chat template renders for the whole conversation, in words; or None."""
        if self.kind != "chat" or not record.chosen or not record.prompt:
            return None
        shown, text = self.prompt_text(record) + self._lead, record.chosen.strip()
        try:
            whole = self._chat.text([*self.prompts.turns(record), Message("assistant", text)], answered=True)
        except UserError:
            return None
        if whole.startswith(shown + text):
            return None
        at = next((i for i, (a, b) in enumerate(zip(shown + text, whole, strict=False)) if a != b), len(whole))
        return f"{(shown + text)[at : at + 40]!r} is trained where the template writes {whole[at : at + 40]!r}"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that become special tokens wherever they stand, also in a stranger's question."""
        return tuple(sorted(special_tokens(self.tokenizer)))

    @property
    def pad_id(self) -> int:
        """Id to fill rows with. It may be the EOS: padding is told by lengths, never by ids."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def ending(self) -> dict[str, Any]:
        """How replies to its prompts end, as arguments of `confidence.generation.generate`."""
        return {"stop_ids": self.stop_ids, "goes_on": self.goes_on, "pad_id": self.pad_id}

    @property
    def hash(self) -> str:
        """SHA-256 over the template's text and the special tokens; a calibrator fitted under another hash is void."""
        tokenizer = self.tokenizer
        text = tokenizer.chat_template if self.kind == "chat" else [PLAIN_QUESTION, PLAIN_ANSWER, PLAIN_BETWEEN]
        parts: list[Any] = [
            self.kind,
            text,
            self._prefix_ids,
            self.end_id,
            tokenizer.bos_token,
            tokenizer.eos_token,
            len(tokenizer),
        ]
        # What is not set leaves the hash of runs that were made before it could be.
        if self.kind == "chat" and self._chat.kwargs:
            parts.append(self._chat.kwargs)
        if self.kind == "chat" and self._chat.merge_system:
            parts.append("merge_system")
        if self.kind == "chat" and self._lead:
            parts.append(["lead", self._lead])
        if self.task.several_lines:
            parts.append(["several lines", *self.stops])
        elif self._own_stops:
            parts.append(["stop", *self._own_stops])
        if (identity := self.task.identity()) is not None:
            parts.append(["task", identity])
        if facts := self.prompts.facts:
            parts.append(facts)
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True, sort_keys=True).encode()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        if (known := self._ahead.get(text)) is not None:
            return list(known)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_stop(self, text: str) -> None:
        """Raise UserError for a stop that no generated tokens would show."""
        if not text or text != text.rstrip(" ") or text not in self._decode(self._encode(text), True):
            raise UserError(
                f"evaluation.stop: {text!r} cannot end a reply: it must not be empty or end in a space (which is part "
                "of the token that follows), and the tokenizer must be able to write it"
            )

    def _special_prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: mostly BOS or nothing. What it puts after is not wanted."""
        bare, full = self._encode(PROBE_ANSWER), list(self.tokenizer(PROBE_ANSWER)["input_ids"])
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:start]

    def _written(self, messages: Sequence[Message], tools: str, answered: bool = False) -> str:
        if self.kind == "plain":
            refuse_tools(messages, tools)
            return plain_text(messages)
        text = self._chat.text(messages, answered, tools)
        check_written(text, messages)
        return text

    @cached_property
    def _end_text(self) -> str:
        return self._decode([self.end_id])


def _ended(ids: Sequence[int], end: int) -> list[int]:
    """The ids with the end behind them, where it is not there already."""
    return [*ids] if ids and ids[-1] == end else [*ids, end]


def _up_to_end(text: str, end: str | None) -> str:
    """The text without white space behind the end token that it closes with."""
    bare = text.rstrip()
    return bare if end and bare.endswith(end) else text


def template_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a run, the same wherever one is rendered: in training, evaluation, answering and serving.

    Raises UserError where the config asks for examples out of the data and they are not settled (`pipeline.prepare`).
    """
    data, task, stop = config.data, task_of(config.task), config.evaluation.stop
    if data.few_shot and not data.examples:
        raise UserError(
            "data.few_shot: the examples of this run are not known; its config.yaml holds them once it began"
        )
    prompts = prompts_of(data, config.evaluation.max_new_tokens)
    return Template(data.template, tokenizer, data.chat_template_kwargs, data.merge_system, task, stop, prompts)

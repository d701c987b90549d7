"""How a reward model reads a question and a reply: as it was trained to, or by its own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibtrain.config_data import DataConfig
from calibtrain.data.chat import ChatFormat, RefusedError, special_tokens
from calibtrain.data.prompts import Prompts, prompts_of
from calibtrain.data.rendering import PLAIN_ANSWER, plain_text
from calibtrain.data.templates import InseparableError, Template
from calibtrain.errors import UserError
from calibtrain.records import Message, Record

FILE = "reward_template.json"
"""Beside the weights of a reward model that calibtrain exports: how its training wrote questions and answers."""
KEYS = ("template", "prompt_template", "system", "examples", "chat_template_kwargs", "merge_system")


def write_reward_template(data: DataConfig, directory: Path) -> None:
    """Keep in a reward model's directory what its scores depend on beside the weights and the tokenizer."""
    values = {key: value for key, value in data.model_dump(mode="json").items() if key in KEYS}
    if data.prompt_template is not None:  # its text, where a file was named
        values["prompt_template"] = prompts_of(data, 1).source
    (directory / FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def read_reward_template(path: Path | None) -> DataConfig | None:
    """What `write_reward_template` kept in the file; None without one. Raises UserError where it is no such file."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not set(values) <= set(KEYS):
            raise ValueError(f"it may hold {', '.join(KEYS)}")
        template = values.get("prompt_template")
        if template is not None and not any(mark in str(template) for mark in ("{{", "{%")):
            raise ValueError("prompt_template holds no Jinja template")  # nor would a file of that name be read
        return DataConfig.model_validate(values)
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        raise UserError(f"{path}: not a template that calibtrain exported ({str(error).splitlines()[0]})") from None


class RewardText:
    """Question and reply as token ids of a reward model's own tokenizer.

    As its training wrote them (`data`), else as one text by its chat template, else as data.template: plain does, with the
    special tokens that the tokenizer puts around a text, and its end token. A reply is text: special tokens that it spells
    are left out. Raises UserError for a tokenizer without a template of `data`'s kind.
    """

    def __init__(self, tokenizer: Any, data: DataConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.special = tuple(sorted(special_tokens(tokenizer), key=len, reverse=True))
        self._template: Template | None = None
        if data is not None:
            prompts = prompts_of(data, 1)
            self._template = Template(
                data.template,
                tokenizer,
                data.chat_template_kwargs,
                data.merge_system,
                prompts=Prompts(prompts.system, prompts.examples, prompts.source, prompts.whole),
            )

    @property
    def form(self) -> str:
        """`trained`, `chat` or `plain`, for people to read."""
        if self._template is not None:
            return f"as it was trained ({self._template.kind})"
        return "by its chat template" if self.tokenizer.chat_template else "plain: it has no chat template"

    def __call__(self, record: Record, reply: str, room: int) -> tuple[list[int], bool]:
        """At most `room` ids, and whether the question lost its beginning. UserError where the template refuses it."""
        ids = self._ids(record, self.cleaned(reply))
        if len(ids) <= room:
            return ids, False
        first = ids[:1] if room > 1 and ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        return [*first, *ids[len(ids) - room + len(first) :]], True

    def cleaned(self, reply: str) -> str:
        """The reply without what the tokenizer would read as special tokens: a policy may write them, and be paid for it."""
        found = True
        while found:  # what is left may spell one again
            found = False
            for token in self.special:
                if token in reply:
                    reply, found = reply.replace(token, ""), True
        return reply

    def _ids(self, record: Record, reply: str) -> list[int]:
        if self._template is not None:
            return [*self._template.prompt_ids(record), *self._answer_ids(self._template, reply)]
        messages = [*Prompts().turns(record), Message("assistant", reply)]
        if self.tokenizer.chat_template:
            return self._encode(self._chat(messages, record), special=False)
        ids = self._encode(plain_text(messages[:-1]) + PLAIN_ANSWER.format(reply), special=True)
        end = self.tokenizer.eos_token_id
        closed = end is None or ids[-1] in (end, self.tokenizer.sep_token_id)
        return ids if closed else [*ids, end]

    def _answer_ids(self, template: Template, reply: str) -> list[int]:
        try:
            return template.completion_ids(reply)
        except InseparableError:  # a policy may say anything
            return [*self._encode(reply, special=False), template.end_id]

    def _chat(self, messages: Sequence[Message], record: Record) -> str:
        try:
            return ChatFormat(self.tokenizer, {}, False).text(messages, answered=True, tools=record.tools)
        except RefusedError as error:
            try:  # a template without a role for system texts
                return ChatFormat(self.tokenizer, {}, True).text(messages, answered=True, tools=record.tools)
            except RefusedError:
                raise UserError(f"{record.origin or record.question}: a reward model's own {error}") from error

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

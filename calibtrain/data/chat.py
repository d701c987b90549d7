"""What a tokenizer's chat template makes of a conversation, and what to do where it refuses one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from calibtrain.data.prompts import PROBE, context_merged
from calibtrain.data.rendering import rendered_turn, system_merged
from calibtrain.errors import UserError
from calibtrain.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_ANSWER = "This one"


def special_tokens(tokenizer: Any) -> set[str]:
    """Texts that become special tokens wherever they stand, also those that no field of the tokenizer names.

    Llama 3's <|start_header_id|> and Phi-3's <|user|> are such: with them a stranger's text writes a turn of its own.
    """
    added = {str(one.content) for one in tokenizer.added_tokens_decoder.values() if one.special}
    return (added | {str(one) for one in tokenizer.all_special_tokens}) - {""}


class RefusedError(UserError):
    """The chat template itself raised."""


class ChatFormat:
    """A tokenizer's chat template, with `kwargs` for it. `merge_system` puts a system turn before the first user text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], merge_system: bool) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs)
        self.merge_system = merge_system

    def text(self, messages: Sequence[Message], answered: bool = False, tools: str = "") -> str:
        """The conversation's text, up to where the model answers unless it is answered already."""
        return str(self.applied(messages, tools, tokenize=False, add_generation_prompt=not answered))

    def applied(self, messages: Sequence[Message], tools: str, **options: Any) -> Any:
        """What the tokenizer makes of a conversation. Raises UserError where its chat template refuses it."""
        messages = context_merged(messages)
        if self.merge_system:
            messages = system_merged(messages)
        if tools and not self.takes_tools:
            raise UserError("data.template: the chat template has no place for the definitions of tools")
        options = {**options, **self.kwargs, **({"tools": json.loads(tools)} if tools else {})}
        try:
            return self.tokenizer.apply_chat_template([rendered_turn(message) for message in messages], **options)
        except Exception as error:  # jinja's own, or what a template raises about roles
            raise RefusedError(f"data.template: the chat template refuses the conversation: {error}") from error

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the chat template writes the definitions of tools: some pass over them."""
        turns = [rendered_turn(message) for message in PROBE.prompt]
        function = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
        tools: Any = [{"type": "function", "function": function}]
        text = self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **self.kwargs)
        return "probe" in str(text)

    def remedy(self, messages: Sequence[Message]) -> str:
        """What to do about a conversation that the chat template refuses, where that is known."""
        roles = [message.role for message in messages]
        if "system" in roles and not self.merge_system:
            try:
                self.text(system_merged(messages))
            except UserError:
                pass
            else:
                return "; set data.merge_system: true to put the system text before the first question"
        if any(one == other for one, other in pairwise(roles)):
            return "; two turns of one role follow each other: join them into one, or use data.template: plain"
        return "; mend the row, or use data.template: plain"

    def lead_and_end(self) -> tuple[str, int]:
        """Whitespace that the template writes before an assistant's turn (Mistral), and the special token after it.

        That need not be the EOS (Llama 3).
        """
        text = self.text([*PROBE.prompt, Message("assistant", PROBE_ANSWER)], answered=True)
        before, _, behind = text.rpartition(PROBE_ANSWER)
        lead = before.removeprefix(self.text(PROBE.prompt))
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ids = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        end = next((token for token in ids if token in special), self.tokenizer.eos_token_id)
        return "" if lead.strip() else lead, end

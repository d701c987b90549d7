"""Which tokens of a conversation are learned: those of the assistant's turns, each behind the prompt it is asked with.

Where the chat template marks them itself ({% generation %}), they are the marked ones. Elsewhere each turn's prompt is
rendered as it will be asked, and compared token by token with what was asked and said before: where it goes on from there,
the conversation is one sequence; where the template writes earlier turns anew (Qwen 3 takes their thinking out), the turn
begins another one, so that no turn is learned behind a prompt that nobody will ever see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Record

IGNORED = -100
"""Label of a token that is read and not learned."""
_NO_THOUGHT = re.compile(r"<think>\s*</think>")


@dataclass(frozen=True, slots=True)
class TokenLabels:
    """Token ids, and for each the id that is learned in its place, or IGNORED. The first is never learned."""

    ids: list[int]
    labels: list[int]


def learned_sequences(record: Record, template: Template) -> list[TokenLabels]:
    """The sequences that teach every turn of `record.learned`, mostly one.

    A turn's last label is the token that ends it, also where the template goes on with another one (`plain` with a blank
    line). Raises UserError where the template refuses the conversation, or a turn cannot be told from its prompt.
    """
    marked = _marked(record, template)
    return [marked] if marked else list(_by_prefixes(record, template))


def text_sequence(text: str, template: Template) -> TokenLabels:
    """Text that is learned as it stands, from its second token on, with the end token."""
    ids, start = template.text_ids(text)
    return TokenLabels(ids, [IGNORED] * start + ids[start:])


def windows(sequence: TokenLabels, max_length: int) -> list[TokenLabels]:
    """A text in pieces of at most `max_length` tokens, each opening with the last token of the one before it."""
    step = max(1, max_length - 1)
    places = range(0, max(1, len(sequence.ids) - 1), step)
    pieces = [(sequence.ids[at : at + step + 1], sequence.labels[at : at + step + 1]) for at in places]
    return [TokenLabels(ids, [IGNORED, *labels[1:]]) for ids, labels in pieces if len(ids) > 1]


def fitted(sequence: TokenLabels, max_length: int, bos_id: int | None) -> TokenLabels | None:
    """The sequence cut from its left to `max_length` tokens, none of its answers in part; None if not even the last fits.

    A BOS stays, unless it is a mark that every turn of a chat opens with.
    """
    ids, labels = sequence.ids, sequence.labels
    over = len(ids) - max_length
    if over <= 0:
        return sequence
    starts = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
    first = next((start for start in starts if start > over), None)  # one token before it is kept
    if first is None:
        return None
    kept, hidden = ids[over:], [IGNORED] * (first - over)
    if first - over > 1 and ids[0] == bos_id and ids[:first].count(bos_id) == 1:
        kept[0] = ids[0]
    return TokenLabels(kept, [*hidden, *labels[first:]])


def _by_prefixes(record: Record, template: Template) -> Iterator[TokenLabels]:
    labels: list[int] = []
    before: _Turn | None = None
    for place in record.learned:
        turn = _turn(record, place, template)
        if before is not None:
            written = before.written_in(turn, template)
            if written is None:
                yield before.last(labels)
                labels = []
            else:
                labels += [*written, before.end]
        labels += [IGNORED] * (len(turn.prompt) - len(labels))
        before = turn
    assert before is not None
    yield before.last(labels)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One turn of the assistant and the prompt that it answers."""

    shown: str
    prompt: list[int]
    said: str
    answer: list[int]  # without its end
    end: int

    def last(self, labels: list[int]) -> TokenLabels:
        """The sequence that ends with this turn."""
        return TokenLabels([*self.prompt, *self.answer, self.end], [*labels, *self.answer, self.end])

    def written_in(self, later: _Turn, template: Template) -> list[int] | None:
        """The answer's ids as they stand in a later turn's prompt, which goes on from this turn's; None if it does not.

        The template may take away whitespace around the answer, or a block of thinking that is empty.
        """
        if not later.shown.startswith(self.shown):
            return None
        candidates = [self.answer]
        said = self.said.strip()
        written = template.until_end(later.shown[len(self.shown) :], said)
        for text, as_written in ((said, False), (written, True)):
            if text != self.said and _NO_THOUGHT.sub("", text).strip() == _NO_THOUGHT.sub("", said).strip():
                try:
                    candidates.append(template.completion_ids(text, as_written)[:-1])
                except UserError:
                    continue
        for ids in candidates:
            so_far = [*self.prompt, *ids]
            if later.prompt[: len(so_far)] == so_far and len(later.prompt) > len(so_far):
                return ids
        return None


def _turn(record: Record, place: int, template: Template) -> _Turn:
    turns = record.turns
    asked = replace(
        record, prompt=turns[:place], chosen=turns[place].content, calls=turns[place].tool_calls, learned=()
    )
    asked = template.fitted(asked)
    said = template.answer_text(asked)
    *answer, end = template.completion_ids(said, written=bool(asked.calls))
    shown = template.prompt_text(asked)
    return _Turn(shown, template.shown_ids(shown), said, answer, end)


def _marked(record: Record, template: Template) -> TokenLabels | None:
    """What the template's own marks say; None without marks, or where they do not fit the prompts that are asked."""
    turns = record.turns
    everyone = [i - len(turns) for i, turn in enumerate(turns) if turn.role == "assistant"]
    found = template.marked_ids(record) if list(record.learned) == everyone else None
    if found is None:
        return None
    ids, mask = found
    prompts = [template.prompt_ids(replace(record, prompt=turns[:place])) for place in record.learned]
    bounds = [*map(len, prompts), len(ids)]
    mask[: bounds[0]] = [False] * bounds[0]  # answers of the examples before the conversation
    for prompt, start, stop in zip(prompts, bounds, bounds[1:], strict=False):
        marked = [i for i in range(start, min(stop, len(ids))) if mask[i]]
        if ids[: len(prompt)] != prompt or not marked:
            return None
        after = marked[-1] + 1
        if template.end_id not in ids[marked[0] : after] and after < len(ids) and ids[after] == template.end_id:
            mask[after] = True  # an answer that never ends is no answer
    last = max(i for i, marked in enumerate(mask) if marked) + 1
    return TokenLabels(ids[:last], [one if on else IGNORED for one, on in zip(ids[:last], mask, strict=False)])

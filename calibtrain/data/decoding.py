"""Generated tokens as text, one by one, in linear time."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def token_texts(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], is_byte: Callable[[int], bool]
) -> tuple[str, ...]:
    """Text that each id adds to the ones before it, so that all joined are `decode(ids)`.

    An end token adds "". So does one that only begins a character (byte-level tokenizers cut inside); the token that
    completes the character has it whole. Takes time in proportion to their number: only the tokens since the last but one
    that added text are decoded with each. `is_byte`: whether an id is one byte of a SentencePiece vocabulary, or skipped.
    """
    texts: list[str] = []
    window, before = 0, 0  # ids[window:before] have been shown, and give what follows its context
    for count in range(1, len(ids) + 1):
        shown, whole = decode(ids[window:before]), decode(ids[window:count])
        if count == len(ids):
            texts.append(decode(ids)[sum(map(len, texts)) :])
        elif whole.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("")
        else:
            texts.append(whole[len(shown) :])
            # A window must open with text, and not with a byte: runs of them are decoded together.
            if any(texts[before:count]) and not is_byte(ids[before]):
                window = before
            before = count
    return tuple(texts)

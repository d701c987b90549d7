"""The pairs, and what else all contenders of train_step.py share."""

from __future__ import annotations

SHAPES = {"long": (128, 32), "short": (24, 8)}
"""Tokens of a prompt and of each response."""
PAIRS, BETA, LEARNING_RATE = 8, 0.5, 1e-6


def token_ids(shape: str, vocabulary: int, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected ids of `count` pairs, the same for every contender."""
    import torch

    prompt, response = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    low = vocabulary // 20  # above the special tokens
    return [
        tuple(torch.randint(low, vocabulary, (n,), generator=generator).tolist() for n in (prompt, response, response))
        for _ in range(count)
    ]  # type: ignore[misc]

"""Batched generation that keeps what confidence needs: each token's log-prob and final hidden state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.models.loss_model import DecodeStep

AllDone = Callable[[bool], bool]
"""Agreement between ranks on whether a batch is finished: ZeRO-3 needs as many forward passes on each."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion of one prompt, up to and with its stop token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, under the model's own (calibrated) distribution
    hidden: Tensor  # (len(tokens), H) final hidden states that predicted them, before the calibrated scale; on CPU
    finished: bool  # False: cut at max_new_tokens


@torch.no_grad()
def generate(
    model: Callable[[DecodeStep], Any],
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    all_done: AllDone = bool,
    share_prefix: bool = True,
    on_batch: Callable[[int], None] = lambda prompts_done: None,
) -> list[list[Generation]]:
    """Complete every prompt: greedily (samples=0, one completion each) or with `samples` draws at temperature 1.

    `model` maps a DecodeStep to (hidden (B, H), logits (B, V), cache). The prompts' longest common prefix (few-shot
    examples, a system prompt) passes through the model once unless `share_prefix` is off. Prompts must not be empty.
    """
    prefix, prefix_cache = _read_prefix(model, prompts, share_prefix, device)
    generator = torch.Generator(device=device).manual_seed(seed) if samples else None
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: list[list[Generation]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = [index for index in order[start : start + batch_size] for _ in range(max(1, samples))]
        suffixes = [prompts[index][len(prefix) :] for index in rows]
        batch = _Batch(suffixes, pad_id, len(prefix), prefix_cache, device)
        for row, generation in zip(
            rows, batch.run(model, frozenset(stop_ids), max_new_tokens, generator, all_done), strict=True
        ):
            results[row].append(generation)
        on_batch(min(start + batch_size, len(order)))
    return results


@torch.no_grad()
def choice_logprobs(
    model: Callable[[DecodeStep], Any],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[int],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
) -> Tensor:
    """Log-probs of the tokens `choices` right after each prompt, among the whole vocabulary. (N, choices) float64 on CPU.

    `model` and `prompts` as in `generate`.
    """
    prefix, prefix_cache = _read_prefix(model, prompts, share_prefix, device)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    wanted = torch.tensor(choices, device=device)
    found = torch.zeros(len(prompts), len(choices), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch([prompts[index][len(prefix) :] for index in rows], pad_id, len(prefix), prefix_cache, device)
        _, logits, _ = model(DecodeStep(batch.inputs()))
        found[rows] = logits.log_softmax(-1)[:, wanted].double().cpu()
    return found


class _Batch:
    """State of one batch: left-padded prompt suffixes behind a shared, cached prefix."""

    def __init__(
        self, suffixes: Sequence[Sequence[int]], pad_id: int, prefix_length: int, prefix_cache: Any, device: Any
    ) -> None:
        rows, width = len(suffixes), max(len(suffix) for suffix in suffixes)
        self.ids = torch.full((rows, width), pad_id, device=device)
        real = torch.zeros((rows, width), dtype=torch.long, device=device)
        for row, suffix in enumerate(suffixes):
            self.ids[row, width - len(suffix) :] = torch.tensor(suffix, device=device)
            real[row, width - len(suffix) :] = 1
        self.mask = torch.cat([real.new_ones(rows, prefix_length), real], dim=1)
        self.positions = (prefix_length + real.cumsum(1) - 1).clamp(min=0)
        self.cache = copy.deepcopy(prefix_cache)
        if self.cache is not None and rows > 1:
            self.cache.batch_repeat_interleave(rows)

    def inputs(self) -> dict[str, Any]:
        """What the backbone reads next."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def run(
        self,
        model: Callable[[DecodeStep], Any],
        stop_ids: frozenset[int],
        max_new_tokens: int,
        generator: torch.Generator | None,
        all_done: AllDone,
    ) -> list[Generation]:
        rows = self.ids.shape[0]
        stops = torch.tensor(sorted(stop_ids), device=self.ids.device)
        done = torch.zeros(rows, dtype=torch.bool, device=self.ids.device)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        lengths = torch.zeros(rows, dtype=torch.long, device=self.ids.device)
        for _ in range(max_new_tokens):
            hidden, logits, self.cache = model(DecodeStep(self.inputs()))
            logprobs = logits.log_softmax(-1)
            if generator is None:
                token = logprobs.argmax(-1)
            else:
                token = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
            steps.append((token, logprobs.gather(1, token[:, None])[:, 0], hidden))
            lengths += ~done
            done = done | torch.isin(token, stops)
            if all_done(bool(done.all())):
                break
            self.ids = token[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(rows, 1)], dim=1)
            self.positions = self.positions[:, -1:] + 1
        tokens, token_logprobs, states = (torch.stack(part, dim=1).cpu() for part in zip(*steps, strict=True))
        return [
            Generation(
                tokens=tuple(tokens[row, :length].tolist()),
                logprobs=tuple(token_logprobs[row, :length].tolist()),
                hidden=states[row, :length],
                finished=int(tokens[row, length - 1]) in stop_ids,
            )
            for row, length in enumerate(lengths.tolist())
        ]


def _read_prefix(
    model: Callable[[DecodeStep], Any], prompts: Sequence[Sequence[int]], share: bool, device: torch.device | str
) -> tuple[list[int], Any]:
    """The prompts' longest common prefix and its cache; ([], None) without one or where it is not shared."""
    prefix = _common_prefix(prompts) if share else []
    if not prefix:
        return [], None
    ids = torch.tensor([prefix], device=device)
    return prefix, model(DecodeStep({"input_ids": ids, "use_cache": True}))[2]


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common prefix that leaves every prompt at least one token."""
    if not prompts:
        return []
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all others lie between them
    limit = min(len(prompt) for prompt in prompts) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return list(first[:length])

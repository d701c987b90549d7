"""Batched generation that keeps what confidence needs: each token's log-prob and final hidden state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.confidence.growing_cache import growing
from calibtrain.models.loss_model import DecodeStep
from calibtrain.records import unit_hash

AllDone = Callable[[bool], bool]
"""Agreement between ranks on whether a batch is finished: ZeRO-3 needs as many forward passes on each."""
DRAWN_AT_ONCE = 32
"""Distributions whose cumulative sums, float64, are in memory together."""
STEPS_ON_DEVICE = 64
"""Steps whose hidden states wait on the device for their way to the CPU."""
Keep = Callable[[int, Sequence[int]], tuple[int, int]]
"""(index of the prompt, tokens of a completion) -> tokens [start, stop) whose hidden states are kept."""


def keep_none(prompt: int, tokens: Sequence[int]) -> tuple[int, int]:
    """No hidden state: for samples, of which log-probs alone are read."""
    return 0, 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion of one prompt, up to and with its stop token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, under the model's own (calibrated) distribution
    hidden: Tensor  # (K, H) final hidden states that predicted the kept tokens, before the calibrated scale; on CPU
    finished: bool  # False: cut at max_new_tokens
    hidden_start: int = 0  # the first kept token; K = len(tokens) where nothing was said about which are kept
    asked: Tensor | None = None  # (H,) the prompt's last state, which predicted the first token; None without any
    # Where layers were asked for:
    entropies: tuple[float, ...] = ()  # of each token's distribution, in nats
    states: Tensor | None = None  # (layers, POSITIONS of a confidence head, H) float32, of the kept tokens


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
    streams: Sequence[object] | None = None,
    device: torch.device | str = "cpu",
    all_done: AllDone = bool,
    share_prefix: bool = True,
    not_first: Sequence[int] = (),
    goes_on: Callable[[Sequence[int]], bool] | None = None,
    keep: Keep | None = None,
    layers: tuple[int, ...] = (),
    on_batch: Callable[[int], None] = lambda prompts_done: None,
) -> list[list[Generation]]:
    """Complete every prompt: greedily (samples=0, one completion each) or with `samples` draws at temperature 1.

    `model` maps a DecodeStep to (hidden (B, H), logits (B, V), cache). The prompts' longest common prefix (few-shot
    examples, a system prompt) passes through the model once unless `share_prefix` is off; a prompt passes through it once
    for all its samples. Tokens in `not_first` begin no completion; log-probs stay the model's own. `goes_on` may keep a
    completion that came to a stop token from ending there. No prompt may be empty.

    What is drawn for a prompt is a function of `seed`, of its stream (by default its place) and of the sample's number: but
    for rounding, whatever else is in the batch, and whichever rank draws it.

    `keep` says which tokens' hidden states are kept, by default all: H numbers a token in the model's dtype (2 MB for 500
    tokens of a model 2048 wide in bf16). While a batch runs, those of all its tokens are on the CPU.

    `layers`: completions come with what a confidence head reads of these layers, and each token's entropy.
    """
    prefix, prefix_cache = _read_prefix(model, prompts, share_prefix, device)
    names = range(len(prompts)) if streams is None else streams
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    copies = max(1, samples)
    results: list[list[Generation]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(len(rows), len(prefix), prefix_cache, device)
        batch.extend([prompts[index][len(prefix) :] for index in rows], pad_id)
        batch.layers = tuple(layers)
        numbers = _numbers(seed, [names[index] for index in rows], samples, max_new_tokens, device)
        found = batch.run(model, frozenset(stop_ids), max_new_tokens, numbers, all_done, copies, not_first, goes_on)
        for place, index in enumerate(rows):
            results[index] = [_kept(one, keep, index) for one in found[place * copies : (place + 1) * copies]]
        on_batch(min(start + batch_size, len(order)))
    return results


@torch.no_grad()
def choice_logprobs(
    model: Callable[[DecodeStep], Any],
    variants: Sequence[Sequence[Sequence[int]]],
    choices: Sequence[int],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
) -> Tensor:
    """Log-probs of the tokens `choices` right after each prompt, among the whole vocabulary: (N, K, choices) float64, CPU.

    `variants` holds K prompts of each of N questions; what those of one question begin with in common passes through the
    model once, as does what all prompts begin with. `model` and prompts as in `generate`.
    """
    prefix, prefix_cache = _read_prefix(model, [one for row in variants for one in row], share_prefix, device)
    stems = [common_prefix(row) if share_prefix else [] for row in variants]
    order = sorted(range(len(variants)), key=lambda index: len(variants[index][0]))
    wanted = torch.tensor(choices, device=device)
    copies = len(variants[0]) if variants else 0
    found = torch.zeros(len(variants), copies, len(choices), dtype=torch.float64)
    size = max(1, batch_size // max(1, copies))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        if copies > 1 and all(len(stems[index]) > len(prefix) for index in rows):
            batch = _Batch(len(rows), len(prefix), prefix_cache, device)
            batch.extend([stems[index][len(prefix) :] for index in rows], pad_id)
            batch.cache = model(DecodeStep(batch.inputs()))[2]
            batch.repeat(copies)
            suffixes = [one[len(stems[index]) :] for index in rows for one in variants[index]]
        else:
            batch = _Batch(len(rows) * copies, len(prefix), prefix_cache, device)
            suffixes = [one[len(prefix) :] for index in rows for one in variants[index]]
        batch.extend(suffixes, pad_id)
        _, logits, _ = model(DecodeStep(batch.inputs()))
        found[rows] = logits.log_softmax(-1)[:, wanted].double().cpu().reshape(len(rows), copies, -1)
    return found


class _Batch:
    """State of one batch behind a shared, cached prefix: what comes next is left-padded."""

    layers: tuple[int, ...] = ()

    def __init__(self, rows: int, prefix_length: int, prefix_cache: Any, device: Any) -> None:
        self.mask = torch.ones(rows, prefix_length, dtype=torch.long, device=device)
        self.cache = copy.deepcopy(prefix_cache)
        if self.cache is not None and rows > 1:
            self.cache.batch_repeat_interleave(rows)

    def extend(self, texts: Sequence[Sequence[int]], pad_id: int) -> None:
        """Let each row go on with its text; no text may be empty."""
        rows, width, device = len(texts), max(len(text) for text in texts), self.mask.device
        self.ids = torch.full((rows, width), pad_id, device=device)
        real = torch.zeros((rows, width), dtype=torch.long, device=device)
        for row, text in enumerate(texts):
            self.ids[row, width - len(text) :] = torch.tensor(text, device=device)
            real[row, width - len(text) :] = 1
        self.positions = (self.mask.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, real], dim=1)

    def repeat(self, copies: int) -> None:
        """Let every row stand for `copies` rows from here on, those of one row together."""
        self.cache.batch_repeat_interleave(copies)
        self.mask, self.positions = (one.repeat_interleave(copies, 0) for one in (self.mask, self.positions))

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
        numbers: Tensor | None,
        all_done: AllDone,
        copies: int,
        not_first: Sequence[int],
        goes_on: Callable[[Sequence[int]], bool] | None,
    ) -> list[Generation]:
        """`copies` completions of each prompt, those of one prompt together."""
        device = self.mask.device
        rows = self.ids.shape[0] * copies
        stops = torch.tensor(sorted(stop_ids), device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        carried = torch.arange(rows, device=device)  # the completions that this batch's rows still are
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        steps = _Steps(rows)
        for step in range(max_new_tokens):
            hidden, logits, self.cache, *states = model(DecodeStep(self.inputs(), self.layers))
            if not step:
                if copies > 1:
                    hidden, logits, *states = (one.repeat_interleave(copies, 0) for one in (hidden, logits, *states))
                    self.repeat(copies)
                self.cache = growing(self.cache)
            logprobs = logits.log_softmax(-1)
            allowed = logprobs
            if not step and not_first:
                allowed = logprobs.index_fill(-1, torch.tensor(not_first, device=device), float("-inf"))
            token = allowed.argmax(-1) if numbers is None else _draw(allowed, numbers[carried, step])
            more = (torch.special.entr(logprobs.exp()).sum(-1), *states) if states else ()
            steps.add(carried, token, logprobs.gather(1, token[:, None])[:, 0], hidden, *more)
            lengths[carried] += ~done
            stopped = torch.isin(token, stops) & ~done
            if goes_on is not None:
                for row in torch.nonzero(stopped)[:, 0].tolist():
                    stopped[row] = not goes_on(steps.said(int(carried[row])))
            done = done | stopped
            ended[carried] |= stopped
            going = torch.nonzero(~done)[:, 0]
            if all_done(len(going) == 0):
                break
            if 0 < 2 * len(going) <= len(carried):  # most are done: the others go on alone
                carried, token, done = carried[going], token[going], done[going]
                self.cache.batch_select_indices(going)
                self.mask, self.positions = self.mask[going], self.positions[going]
            self.ids = token[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(carried), 1)], dim=1)
            self.positions = self.positions[:, -1:] + 1
        return steps.completions(lengths.tolist(), ended.tolist())


def _numbers(
    seed: int, streams: Sequence[object], samples: int, steps: int, device: torch.device | str
) -> Tensor | None:
    """A uniform number for each step of each sample of each stream, (streams x samples, steps) float64; None without any."""
    if not samples:
        return None
    seeds = [int(unit_hash("draws", seed, stream, k) * 2**53) for stream in streams for k in range(samples)]
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(one), dtype=torch.float64) for one in seeds]
    return torch.stack(rows).to(device)


def _draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """One token (B,) of each distribution (B, V), by a uniform number (B,) for each.

    Far cheaper than torch.multinomial, which draws V numbers for each.
    """
    tokens = []
    for some, numbers in zip(logprobs.split(DRAWN_AT_ONCE), uniform[:, None].split(DRAWN_AT_ONCE), strict=True):
        cumulative = some.double().exp_().cumsum_(-1)
        tokens.append(torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0])
    return torch.cat(tokens).clamp_(max=logprobs.shape[1] - 1)


class _Steps:
    """What each step gave to the completions that it carried; brought to the CPU every STEPS_ON_DEVICE steps."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._waiting: list[tuple[Tensor, ...]] = []  # which, token, log-prob, hidden state; entropy, states of layers
        self._blocks: list[list[Tensor]] = []  # (rows, steps), (rows, steps), (rows, steps, H), ...
        self._said: list[list[int]] = [[] for _ in range(rows)]
        self._read = 0  # waiting steps whose tokens are in _said

    def add(self, carried: Tensor, token: Tensor, logprob: Tensor, hidden: Tensor, *more: Tensor) -> None:
        """The next step: tensors whose first dimension are the completions at `carried` (B,)."""
        self._waiting.append((carried, token, logprob, hidden, *more))
        if len(self._waiting) == STEPS_ON_DEVICE:
            self._flush()

    def said(self, completion: int) -> list[int]:
        """Tokens of one completion so far, each read from the device once."""
        for carried, token, *_ in self._waiting[self._read :]:
            for row, one in zip(carried.tolist(), token.tolist(), strict=True):
                self._said[row].append(one)
        self._read = len(self._waiting)
        return self._said[completion]

    def completions(self, lengths: Sequence[int], ended: Sequence[bool]) -> list[Generation]:
        """The first lengths[i] tokens of each."""
        self._flush()
        tokens, logprobs, hidden, *more = (torch.cat(parts, dim=1) for parts in zip(*self._blocks, strict=True))
        return [
            Generation(
                tokens=tuple(tokens[row, :length].tolist()),
                logprobs=tuple(logprobs[row, :length].tolist()),
                hidden=hidden[row, :length],
                finished=ended[row],
                entropies=tuple(more[0][row, :length].tolist()) if more else (),
                states=more[1][row, :length] if more else None,
            )
            for row, length in enumerate(lengths)
        ]

    def _flush(self) -> None:
        if not self._waiting:
            return
        self.said(0)
        parts = [one.new_zeros(self.rows, len(self._waiting), *one.shape[1:]) for one in self._waiting[0][1:]]
        for place, (carried, *given) in enumerate(self._waiting):
            for part, one in zip(parts, given, strict=True):
                part[carried, place] = one
        self._blocks.append([part.cpu() for part in parts])
        self._waiting, self._read = [], 0


def _kept(one: Generation, keep: Keep | None, prompt: int) -> Generation:
    """The completion with the hidden states to keep; a copy, so that the batch's own can go."""
    start, stop = (0, len(one.tokens)) if keep is None else keep(prompt, one.tokens)
    states = None
    if one.states is not None:
        wide, last = one.states.float(), max(start, stop - 1)
        states = torch.stack([wide[0], wide[start : last + 1].mean(0), wide[last]], dim=1)
    if keep is None:
        return replace(one, states=states)
    hidden = one.hidden[start:stop].clone()
    return replace(one, hidden=hidden, hidden_start=start, asked=one.hidden[0].clone(), states=states)


def _read_prefix(
    model: Callable[[DecodeStep], Any], prompts: Sequence[Sequence[int]], share: bool, device: torch.device | str
) -> tuple[list[int], Any]:
    """The prompts' longest common prefix and its cache; ([], None) without one or where it is not shared."""
    prefix = common_prefix(prompts) if share else []
    if not prefix:
        return [], None
    ids = torch.tensor([prefix], device=device)
    return prefix, model(DecodeStep({"input_ids": ids, "use_cache": True}))[2]


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common prefix that leaves every prompt at least one token."""
    if not prompts:
        return []
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all others lie between them
    limit = min(len(prompt) for prompt in prompts) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return list(first[:length])

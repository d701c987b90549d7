"""The confidence head: the chance that an answer is right, of its likelihood and of the hidden states that predicted it.

At the start it is the likelihood: slope 1 on its log-odds, and every other weight 0. All it reads is there when an answer
has been generated: the states that predicted the answer's tokens, not those behind them, so that no further pass is needed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calibtrain.losses.terms import Batch, LossTerm, sequence_sums
from calibtrain.losses.token_terms import answer_logprob, answer_tokens, own_answers, sum_term
from calibtrain.ops import TokenStats, at_least_float32, log1mexp

POSITIONS = ("asked", "answer_mean", "answer_end")
"""States that predicted tokens: the reply's first one, the answer's (their mean), and the answer's last one."""
READINGS = ("mean_logprob", "least_logprob", "first_logprob", "mean_entropy", "largest_entropy", "log_tokens")
"""What is read of the likelihood beside its log-odds, in nats; of the answer's tokens alone."""
QUIET = 1e-3
"""Share of its gradient that the head's weights get. To AdamW its size is nothing, but gradients are clipped by their norm
together: so the head has no part in how far the model moves."""


class ConfidenceHead(nn.Module):
    """Log-odds of being right: slope * logit(q) + bias + readings . r + weight . states, made in float32 or better.

    Each state is normalised over its width, without a gain, so that no layer outweighs the others by its size.

    Args:
        layers: hidden states that it reads; 0 is the embeddings, k the output of block k.
        width: of a hidden state.
        score, weight: of the term `confidence_head` in the loss: "log" or "brier".
        trains_backbone: let the score's gradient through to the model; otherwise the model trains as without the head.
    """

    name = "confidence_head"

    def __init__(
        self,
        layers: tuple[int, ...],
        width: int,
        *,
        score: Literal["log", "brier"] = "log",
        weight: float = 1.0,
        trains_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.score, self.term_weight, self.trains_backbone = layers, score, weight, trains_backbone
        self.slope = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.readings = nn.Parameter(torch.zeros(len(READINGS)))
        self.weight = nn.Parameter(torch.zeros(len(layers) * len(POSITIONS), width))

    def logit(self, logprob: Tensor, readings: Tensor, states: Tensor) -> Tensor:
        """`logprob` (S,) of whole answers, `readings` (S, READINGS), `states` (S, layers, POSITIONS, H) to log-odds (S,)."""
        with torch.autocast(logprob.device.type, enabled=False):
            slope, bias, ours, weight = (_quiet(one) for one in (self.slope, self.bias, self.readings, self.weight))
            inputs = normalized(states).flatten(1)
            linear = at_least_float32(readings) @ ours.to(inputs.dtype) + inputs @ weight.flatten().to(inputs.dtype)
            return slope * log_odds(logprob) + bias + linear

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`confidence_head`: the graded answers. () int64."""
        return {self.name: own_answers(batch, graded=True).sum()}

    def forward(self, stats: TokenStats, states: Tensor, batch: Batch) -> Tensor:
        """Log-odds (S,) of a batch's graded answers being right, with harmless numbers for all else.

        `states` (N, layers, H) predicted its targets. A tensor, in which ZeRO-3 finds where backward needs the weights.
        """
        graded = own_answers(batch, graded=True)
        if not self.trains_backbone:
            states, stats = states.detach(), TokenStats(*(one.detach() for one in stats))
        whole = answer_logprob(stats, batch, graded)
        read = readings_of(stats.logprob, stats.entropy, answer_tokens(batch), batch.sequence_ids, len(batch.roles))
        return self.logit(whole, read, answer_states(states, batch))

    def terms(self, logit: Tensor, batch: Batch) -> dict[str, LossTerm]:
        """The score of what `forward` gave."""
        graded = own_answers(batch, graded=True)
        scores = score_of(logit, torch.where(graded, batch.correct, 0.0), self.score)
        return {self.name: sum_term(scores, graded, self.term_weight)}


def log_odds(logprob: Tensor) -> Tensor:
    """log(q / (1 - q)), q = exp(logprob); float32 or better, finite as q rounds to 1."""
    return at_least_float32(logprob) - log1mexp(logprob)


def score_of(logit: Tensor, correct: Tensor, score: str) -> Tensor:
    """Log or Brier score (S,) of the probability sigmoid(logit) against grades (S,)."""
    if score == "brier":
        return (logit.sigmoid() - correct).square()
    return nn.functional.softplus(logit) - correct * logit


def normalized(states: Tensor) -> Tensor:
    """States (S, layers, POSITIONS, H), each with mean 0, and the length 1 of all of an answer's together; float32."""
    wide = at_least_float32(states)
    size = max(1, wide[0].numel()) if len(wide) else 1
    return nn.functional.layer_norm(wide, wide.shape[-1:]) / size**0.5


def readings_of(logprob: Tensor, entropy: Tensor, read: Tensor, owner: Tensor, count: int) -> Tensor:
    """READINGS (count, 6) of each sequence's tokens where `read` (N,) bool holds; `owner` (N,) int64 is ascending.

    `logprob` and `entropy` (N,) in nats. 0 where a sequence has no such token.
    """
    logprob, entropy = at_least_float32(logprob), at_least_float32(entropy)
    tokens = sequence_sums(read.to(logprob.dtype), owner, count)
    some, safe = tokens > 0, tokens.clamp(min=1.0)
    place = torch.arange(len(owner), device=owner.device)
    first = _extreme(torch.where(read, place, len(owner)), owner, count, "amin").clamp(max=max(0, len(owner) - 1))
    columns = (
        sequence_sums(torch.where(read, logprob, 0.0), owner, count) / safe,
        _extreme(torch.where(read, logprob, 0.0), owner, count, "amin"),
        logprob[first] if len(owner) else torch.zeros_like(tokens),
        sequence_sums(torch.where(read, entropy, 0.0), owner, count) / safe,
        _extreme(torch.where(read, entropy, 0.0), owner, count, "amax"),
        safe.log(),
    )
    return torch.where(some[:, None], torch.stack(columns, dim=1), 0.0)


def answer_states(states: Tensor, batch: Batch) -> Tensor:
    """Of the states (N, layers, H) that predicted a batch's targets those at POSITIONS: (S, layers, POSITIONS, H).

    0 where a sequence has no answer.
    """
    count, owner, read = len(batch.roles), batch.sequence_ids, answer_tokens(batch)
    if not len(owner):
        return states.new_zeros(count, states.shape[1], len(POSITIONS), states.shape[2])
    place = torch.arange(len(owner), device=owner.device)
    asked = _extreme(torch.where(batch.is_completion, place, len(owner)), owner, count, "amin").clamp(
        max=len(owner) - 1
    )
    end = _extreme(torch.where(read, place, 0), owner, count, "amax")
    tokens = sequence_sums(read.float(), owner, count)
    wide = torch.where(read[:, None, None], at_least_float32(states), 0.0)
    mean = wide.new_zeros(count, *wide.shape[1:]).index_add(0, owner, wide) / tokens.clamp(min=1.0)[:, None, None]
    found = torch.stack([at_least_float32(states)[asked], mean, at_least_float32(states)[end]], dim=2)
    return torch.where((tokens > 0)[:, None, None, None], found, 0.0)


def _extreme(values: Tensor, owner: Tensor, count: int, how: str) -> Tensor:
    """Least or largest of each sequence's values (N,), and 0 where it has none. (count,)."""
    return values.new_zeros(count).scatter_reduce(0, owner, values, how, include_self=False)


def _quiet(parameter: Tensor) -> Tensor:
    """The very values, with QUIET of the gradient."""
    wide = at_least_float32(parameter)
    still = wide.detach()
    return still + QUIET * (wide - still)

"""[IDK] token: probability moves from the wrong answer to saying so (Cohen, Dobler, Biran, de Melo 2024, 2412.06676)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import NLLScope, learned_tokens, readable, sum_term
from calibtrain.ops import TokenStats, at_least_float32, log1mexp


def idk_weight(logprob: Tensor, confidence: Tensor, scale: float = 0.2) -> Tensor:
    """Share of the target that goes to [IDK]: lambda = scale * (1 - p_gold / max_v p_v), in [0, scale].

    Data to the loss: with a gradient of its own it would be lowered, and the loss with it, by lowering max_v p_v.
    `logprob` (N,) of the gold tokens, `confidence` (N,) the largest probability. Returns (N,).
    """
    ratio = at_least_float32(logprob.detach()).exp() / at_least_float32(confidence.detach())
    return (scale * (1.0 - ratio)).clamp(min=0.0, max=scale)


def idk_loss(
    logprob: Tensor,
    idk_logprob: Tensor,
    confidence: Tensor,
    correct: Tensor,
    *,
    scale: float = 0.2,
    regularized: Tensor | bool = False,
) -> Tensor:
    """-(1 - lambda) log p_gold - lambda log p_idk where the likeliest token is wrong, cross-entropy where it is right.

    Args:
        logprob: (N,) of the gold tokens, differentiable.
        idk_logprob: (N,) of [IDK] at the same positions, differentiable.
        confidence: (N,) probability of the likeliest token.
        correct: (N,) bool, whether that is the gold one.
        scale: the paper's Pi, in [0, 1].
        regularized: where the likeliest token is right, add -log(1 - p_idk). A bool, or (N,).

    Returns:
        (N,) float32 or float64; finite, in value and gradient, for log-probs from 0 to -1e4 and below.
    """
    logprob, idk_logprob = at_least_float32(logprob), at_least_float32(idk_logprob)
    share = torch.where(correct, 0.0, idk_weight(logprob, confidence, scale))
    loss = -(1.0 - share) * logprob - share * idk_logprob
    # The other branch gets a harmless input: torch.where differentiates it too.
    add = correct & torch.as_tensor(regularized, device=correct.device)
    penalty = -log1mexp(torch.where(add, idk_logprob, -1.0))
    return loss + torch.where(add, penalty, 0.0)


class IDKLoss(nn.Module):
    """Objective: the [IDK] loss of the CHOSEN sequences' tokens, mean over tokens.

    The model needs the token: calibtrain.models.new_token.add_token makes room for it.

    Args:
        token_set: the id of [IDK], alone.
        scale: largest share of a wrong token's target that goes to [IDK].
        regularize: also push p_idk down where the model is right.
        nll_scope: "completion", or "full" for prompt and completion.
    """

    name = "idk"
    token_set: Tensor

    def __init__(
        self,
        *,
        token_set: Sequence[int],
        scale: float = 0.2,
        regularize: bool = True,
        nll_scope: NLLScope = "completion",
    ) -> None:
        super().__init__()
        if len(token_set) != 1 or not 0 <= scale <= 1:
            raise UserError(f"token_set must be one token id and scale in [0, 1], got {list(token_set)} and {scale}")
        self.register_buffer("token_set", torch.tensor(list(token_set), dtype=torch.int64), persistent=False)
        self.scale = scale
        self.regularize = regularize
        self.nll_scope = nll_scope

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`idk`: the tokens. () int64."""
        return {"idk": learned_tokens(batch, self.nll_scope).sum()}

    def forward(self, stats: TokenStats, batch: Batch, set_logprob: Tensor) -> dict[str, LossTerm]:
        """One term, `idk`; `set_logprob` (N, 1) are the log-probs of [IDK] at every target."""
        read = learned_tokens(batch, self.nll_scope)
        safe = readable(stats, read)
        values = idk_loss(
            safe.logprob,
            torch.where(read, set_logprob[:, 0], -1.0),
            safe.confidence,
            safe.correct,
            scale=self.scale,
            regularized=(batch.targets != self.token_set) & self.regularize,  # where [IDK] is right it stays likely
        )
        return {"idk": sum_term(values, read)}


CATALOG = (
    LossEntry(
        name="idk",
        kind="objective",
        title="Cross-entropy that moves probability to an [IDK] token where the model is wrong",
        paper="Cohen, Dobler, Biran, de Melo 2024, arXiv 2412.06676",
        equation="-(1 - lambda) log p_gold - lambda log p_idk",
        cost="2 dot products a target token",
        compared_with="the authors' trainer (adaptive weight), written out over all logits, lambda detached",
        largest_deviation="1e-11 (value and gradient, float64)",
        differs=(
            "The weight lambda carries no gradient: in the public code the model can lower its loss by lowering "
            "max p. Two gathered log-probs instead of one-hot vectors over the vocabulary. The public code fixes the "
            "adaptive scale at 0.2 whatever its argument says; here `scale` is used."
        ),
    ),
)

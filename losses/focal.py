"""Cross-entropy that holds confidence back: focal loss, label smoothing within a token set, confidence penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import NLLScope, learned_tokens, readable, sum_term
from calibtrain.ops import TokenStats, at_least_float32, log1mexp


def focal_loss(logprob: Tensor, gamma: Tensor | float) -> Tensor:
    """-(1 - p)^gamma log p, p = exp(logprob) (Lin et al. 2017, arXiv 1708.02002, eq. 4); gamma = 0 is cross-entropy.

    `logprob` (N,) floating <= 0; `gamma` >= 0, a number or (N,). Returns (N,) float32 or float64. Finite, in value and
    gradient, for log-probs from 0 to -1e4 and below and any gamma, also below 1 where d (1 - p)^gamma is infinite at 1.
    """
    return -torch.exp(gamma * log1mexp(logprob)) * at_least_float32(logprob)


def sample_gamma(logprob: Tensor, gamma: float = 3.0) -> Tensor:
    """Sample-dependent gamma: 5 for p < 0.2, 3 for p < 0.5, else `gamma` (Mukhoti et al. 2020, arXiv 2002.09437).

    With gamma = 3 it is the paper's FLSD-53. `logprob` (N,); returns (N,) without gradient, as a step function has none.
    """
    p = at_least_float32(logprob.detach()).exp()
    return torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 3.0, gamma)).to(logprob.dtype)


def smoothed_nll(logprob: Tensor, set_logprob: Tensor, in_set: Tensor, epsilon: float) -> Tensor:
    """Label smoothing within a set S of K tokens: -(1 - eps) log p_y - eps/K sum_{v in S} log p_v for y in S.

    Cross-entropy elsewhere. Uniform smoothing (Szegedy et al. 2016, arXiv 1512.00567) would teach a language model to
    give eps to the V - K tokens that no answer can be. `logprob` (N,), `set_logprob` (N, K), `in_set` (N,) bool: whether
    the target is in S. Returns (N,).
    """
    logprob, set_logprob = at_least_float32(logprob), at_least_float32(set_logprob)
    smoothed = -(1.0 - epsilon) * logprob - epsilon * set_logprob.mean(dim=-1)
    return torch.where(in_set, smoothed, -logprob)


class FocalLoss(nn.Module):
    """Objective: focal loss of the tokens of the CHOSEN sequences, mean over tokens.

    Args:
        gamma: the focusing exponent; 0 is cross-entropy.
        sample_dependent: 5 where p < 0.2 and 3 where p < 0.5 instead, `gamma` above.
        nll_scope: "completion", or "full" for prompt and completion.
    """

    name = "focal"

    def __init__(
        self, *, gamma: float = 3.0, sample_dependent: bool = True, nll_scope: NLLScope = "completion"
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"gamma must be 0 or more, got {gamma}")
        self.gamma = gamma
        self.sample_dependent = sample_dependent
        self.nll_scope = nll_scope

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`focal`: the tokens. () int64."""
        return {"focal": learned_tokens(batch, self.nll_scope).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `focal`."""
        read = learned_tokens(batch, self.nll_scope)
        logprob = readable(stats, read).logprob
        gamma = sample_gamma(logprob, self.gamma) if self.sample_dependent else self.gamma
        return {"focal": sum_term(focal_loss(logprob, gamma), read)}


class LabelSmoothingLoss(nn.Module):
    """Objective: cross-entropy of the CHOSEN sequences' tokens, smoothed where the target is of a token set.

    Args:
        token_set: the tokens that can answer, such as the letters of the options.
        epsilon: probability that is spread evenly over them.
        nll_scope: "completion", or "full" for prompt and completion.
    """

    name = "label_smoothing"
    token_set: Tensor

    def __init__(self, *, token_set: Sequence[int], epsilon: float = 0.1, nll_scope: NLLScope = "completion") -> None:
        super().__init__()
        if not 0 <= epsilon < 1 or not len(token_set):
            raise UserError(f"epsilon must be in [0, 1) and token_set not empty, got {epsilon} and {list(token_set)}")
        self.register_buffer("token_set", torch.tensor(list(token_set), dtype=torch.int64), persistent=False)
        self.epsilon = epsilon
        self.nll_scope = nll_scope

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`label_smoothing`: the tokens. () int64."""
        return {"label_smoothing": learned_tokens(batch, self.nll_scope).sum()}

    def forward(self, stats: TokenStats, batch: Batch, set_logprob: Tensor) -> dict[str, LossTerm]:
        """One term, `label_smoothing`; `set_logprob` (N, K) are the log-probs of `token_set` at every target.

        Logs once that no target of the first 20 micro-batches is of the set: so far this is cross-entropy.
        """
        read = learned_tokens(batch, self.nll_scope)
        in_set = read & torch.isin(batch.targets, self.token_set)
        watch_of(self).see({"smoothed": in_set.sum()})
        safe = torch.where(in_set[:, None], set_logprob, 0.0)
        values = smoothed_nll(readable(stats, read).logprob, safe, in_set, self.epsilon)
        return {"label_smoothing": sum_term(values, read)}


class ConfidencePenalty(nn.Module):
    """Penalty: -H(p), the negative entropy of each completion token's distribution (Pereyra et al. 2017, 1701.06548).

    Args:
        weight: the paper's beta.
    """

    name = "confidence_penalty"

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`confidence_penalty`: the tokens. () int64."""
        return {"confidence_penalty": learned_tokens(batch).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `confidence_penalty`."""
        read = learned_tokens(batch)
        return {"confidence_penalty": sum_term(-readable(stats, read).entropy, read, self.weight)}


CATALOG = (
    LossEntry(
        name="focal",
        kind="objective",
        title="Focal loss, its exponent fixed or dependent on the token",
        paper="Lin et al. 2017, arXiv 1708.02002; Mukhoti et al. 2020, arXiv 2002.09437",
        equation="-(1 - p)^gamma log p (eq. 4); gamma = 5, 3 or the given one by p (FLSD-53)",
        cost="none: reads TokenStats",
        compared_with="torch-uncertainty 0.13.0; the authors' loop for the exponent",
        largest_deviation="1e-11 (value and gradient, float64)",
        differs=(
            "The exponent is chosen with torch.where; the authors loop over samples with .item(), and sum by default. "
            "(1 - p)^gamma is taken through log(1 - p), so that gamma < 1 has no NaN gradient at p = 1."
        ),
    ),
    LossEntry(
        name="label_smoothing",
        kind="objective",
        title="Label smoothing within a set of answer tokens",
        paper="Szegedy et al. 2016, arXiv 1512.00567",
        equation="q' = (1 - eps) [v = y] + eps/K [v in S]",
        cost="K + 1 dot products a target token",
        compared_with="torch.nn.functional.cross_entropy with soft targets",
        largest_deviation="1e-11 (value and gradient, float64)",
        differs="Smooths over the tokens that can answer, not over the whole vocabulary.",
    ),
    LossEntry(
        name="confidence_penalty",
        kind="penalty",
        title="Negative entropy of the next-token distributions",
        paper="Pereyra et al. 2017, arXiv 1701.06548",
        equation="-beta H(p)",
        cost="none: reads TokenStats",
        compared_with="torch-uncertainty 0.13.0 with eps = 0; netcal 1.4.0",
        largest_deviation="1e-7 (theirs has a float32 constant); 1e-11 to the formula (value and gradient, float64)",
        differs="Without the constant log V, and without torch-uncertainty's eps inside the logarithm, which biases "
        "it. netcal's PyTorch module has the other sign, which its own function and the paper have not.",
    ),
)

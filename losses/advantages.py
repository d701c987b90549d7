"""From rewards to credit: what each sampled completion, or each of its tokens, is praised or blamed for.

All rewards of a group must be there: with several ranks, gather them first. A NaN reward (an answer that nobody could
grade) counts for nothing: it enters no baseline, and its advantage is 0.

Theta or data: rewards are data. One that is a function of the weights, such as the score of the policy's own likelihood,
has a derivative of its own beside that of what is sampled, and an advantage would drop it: such rewards are refused, and
their place is the loss (`calibtrain.losses.AnswerScoreLoss`). Values are a baseline, which is right without a gradient, and
returns a target: neither carries any.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.silence import watch_of
from calibtrain.ops import at_least_float32

STD_EPSILON = 1e-4
"""Added to the standard deviation of a group, as TRL does."""

AdvantageScale = Literal["group", "batch", "none"]


def group_sums(values: Tensor, group_ids: Tensor) -> Tensor:
    """Sum over each item's group, at each item. `values` (S,), `group_ids` (S,) int64 >= 0; returns (S,)."""
    size = int(group_ids.max()) + 1 if group_ids.numel() else 0
    return values.new_zeros(size).index_add(0, group_ids, values)[group_ids]


def grpo_advantages(rewards: Tensor, group_ids: Tensor, *, scale: AdvantageScale = "group") -> Tensor:
    """A_i = (R_i - mean of the group) / (std + 1e-4) (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2).

    `scale` says whose standard deviation (with n - 1): of the group, of the batch, or none (Dr. GRPO: Liu et al. 2025,
    arXiv 2503.20783). Divided by its group's own spread a proper score is a rank: a right answer's group and a wrong one's
    count alike, and stating 0 or 1 is best. Take "none" for such rewards. Equal rewards of a group give exactly 0.

    `rewards` (S,) floating, NaN where there is none; `group_ids` (S,) int64. Returns (S,) float64, without gradient. Raises
    UserError where every completion is alone in its group, so that no advantage could differ from 0, and for rewards that
    carry a gradient; logs once that all were 0 in the first 20 calls.
    """
    if scale not in ("group", "batch", "none"):
        raise UserError(f"scale must be group|batch|none, got {scale!r}")
    values, known = _known(rewards)
    counts = group_sums(known, group_ids)
    if rewards.numel() and not bool((group_sums(torch.ones_like(values), group_ids) > 1).any()):
        raise UserError(
            f"advantages: each of the {rewards.numel()} completions is alone in its group, and is compared with nothing; "
            "completions of one prompt share a group id, and several ranks' are gathered first"
        )
    shifted = torch.where(known > 0, values - _group_min(values, known, group_ids), 0.0)  # equal rewards: exactly 0
    centered = shifted - group_sums(shifted, group_ids) / counts.clamp(min=1.0)
    centered = torch.where((known > 0) & (counts > 1), centered, 0.0)
    watch_of(("advantages",)).see({"advantages": (centered != 0).sum()})
    if scale == "none":
        return centered
    if scale == "group":
        variance = group_sums(centered.square(), group_ids) / (counts - 1.0).clamp(min=1.0)
    else:
        kept = values[known > 0]
        variance = kept.var() if kept.numel() > 1 else values.new_zeros(())
    return centered / (variance.sqrt() + STD_EPSILON)


def rloo_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = R_i - mean of the others of its group (Ahmadian et al. 2024, arXiv 2402.14740, eq. 6).

    The baseline does not depend on the answer it is compared with, so that the gradient is unbiased. Shapes as in
    `grpo_advantages`; a completion without a graded sibling has advantage 0.
    """
    counts = group_sums(_known(rewards)[1], group_ids)
    return grpo_advantages(rewards, group_ids, scale="none") * counts / (counts - 1.0).clamp(min=1.0)


def leave_one_out_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """Mean of the others of each item's group; the item's own value where it is alone, NaN where nobody has one.

    `values` (S,) floating, NaN where there is none; `group_ids` (S,) int64. Returns (S,) float64.
    """
    found, known = _known(values)
    counts = group_sums(known, group_ids) - known
    others = (group_sums(found, group_ids) - found) / counts.clamp(min=1.0)
    return torch.where(counts > 0, others, values.to(torch.float64))


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, sequence_ids: Tensor, *, beta: float) -> Tensor:
    """PPO's reward of each token: -beta * kl_t, plus the completion's reward at its last token (arXiv 2203.02155).

    `rewards` (S,); `kl` (N,), k1 of each token; `mask` (N,) bool, the sampled tokens; `sequence_ids` (N,) int64
    ascending in [0, S). Returns (N,), 0 outside the mask. `kl` is data: the gradient of k1 itself is 0 on average, and
    credit for it is the whole gradient of the divergence.
    """
    result = torch.where(mask, -beta * at_least_float32(kl.detach()), 0.0)
    last = last_tokens(mask, sequence_ids, rewards.shape[0])
    return result.index_add(0, last[last >= 0], rewards.to(result)[last >= 0])


def last_tokens(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Index of the last token of each sequence where `mask` holds, -1 where it has none. Returns (S,) int64."""
    index = torch.where(mask, torch.arange(mask.shape[0], device=mask.device), -1)
    empty = index.new_full((num_sequences,), -1)
    return empty.scatter_reduce(0, sequence_ids, index, "amax", include_self=True)


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16): A_t = sum_l (gamma lam)^l delta_{t+l}, and returns A_t + V_t.

    delta_t = r_t + gamma V_{t+1} - V_t. After a sequence's last token V is its `last_values` (S,): 0 where it has ended, as
    without them everywhere, and that of the state it came to where it was cut (Pardo et al. 2018, arXiv 1712.00378).
    `rewards`, `values` (N,) floating; `mask` (N,) bool, the sampled tokens; `sequence_ids` (N,) int64 ascending. Returns two
    (N,) without gradient, 0 outside the mask. Raises UserError for rewards that carry a gradient.
    """
    _check_data(rewards)
    values = at_least_float32(values.detach())
    advantages = torch.zeros_like(values)
    index = mask.nonzero()[:, 0]
    if not index.numel():
        return advantages, advantages.clone()
    owner = sequence_ids[index]
    lengths = torch.bincount(owner)
    starts = lengths.cumsum(0) - lengths
    offset = torch.arange(index.shape[0], device=index.device) - starts[owner]
    width = int(lengths.max())
    grid = values.new_zeros((2, lengths.shape[0], width + 1))
    grid[0, owner, offset], grid[1, owner, offset] = rewards[index].to(values), values[index]
    if last_values is not None:
        grid[1, torch.arange(lengths.shape[0], device=index.device), lengths] = last_values[: lengths.shape[0]].to(
            values
        )
    result = torch.zeros_like(grid[0])
    for t in range(width - 1, -1, -1):
        delta = grid[0, :, t] + gamma * grid[1, :, t + 1] - grid[1, :, t]
        result[:, t] = torch.where(t < lengths, delta + gamma * lam * result[:, t + 1], 0.0)
    advantages[index] = result[owner, offset]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of the masked tokens (N,) with mean 0 and variance 1, over all that are given; 0 outside the mask."""
    advantages = at_least_float32(advantages)
    kept = advantages[mask]
    if kept.numel() < 2:
        return torch.where(mask, advantages, 0.0)
    return torch.where(mask, (advantages - kept.mean()) * torch.rsqrt(kept.var() + 1e-8), 0.0)


def decoupled_advantages(
    answer_advantages: Tensor, confidence_advantages: Tensor, is_confidence: Tensor, sequence_ids: Tensor
) -> Tensor:
    """Credit of each token where answer and stated confidence are judged apart (DCPO: Ma et al. 2026, arXiv 2603.09117).

    The words of the answer get the advantage of its correctness, the words of the confidence that of its score: no
    weight between the two can then make it pay to be wrong on purpose. Both advantages (S,); `is_confidence` (N,) bool;
    `sequence_ids` (N,) int64. Returns (N,).
    """
    if answer_advantages.shape != confidence_advantages.shape or is_confidence.shape != sequence_ids.shape:
        raise UserError(
            f"answer and confidence advantages must be (S,) and is_confidence and sequence_ids (N,), got "
            f"{tuple(answer_advantages.shape)}, {tuple(confidence_advantages.shape)}, {tuple(is_confidence.shape)}, "
            f"{tuple(sequence_ids.shape)}"
        )
    return torch.where(is_confidence, confidence_advantages[sequence_ids], answer_advantages[sequence_ids])


def _known(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in float64 with 0 for NaN, and 1 where there is a value, else 0. Raises UserError for a gradient."""
    _check_data(values)
    known = ~values.isnan()
    return values.to(torch.float64).nan_to_num(0.0), known.to(torch.float64)


def _check_data(rewards: Tensor) -> None:
    if rewards.requires_grad:
        raise UserError(
            "rewards carry a gradient, which an advantage would drop: a reward is a number that was measured. Put what "
            "depends on the weights into the loss (the score of a likelihood: AnswerScoreLoss), and detach() the rest"
        )


def _group_min(values: Tensor, known: Tensor, group_ids: Tensor) -> Tensor:
    size = int(group_ids.max()) + 1 if group_ids.numel() else 0
    least = values.new_full((size,), torch.inf)
    return least.scatter_reduce(0, group_ids, torch.where(known > 0, values, torch.inf), "amin")[group_ids]


_NAN = "An ungraded completion is left out of its group"
CATALOG = (
    LossEntry(
        "grpo_advantages",
        "function",
        "Credit relative to the group's mean, over its standard deviation",
        "Shao et al. 2024, arXiv 2402.03300; without the deviation Liu et al. 2025, arXiv 2503.20783",
        "(R_i - mean) / (std + 1e-4) (sec. 4.1.2)",
        "none",
        "TRL 1.16.0 (nanmean, nanstd)",
        "1e-6 (value)",
        "Equal rewards give exactly 0, where rounding leaves up to 1e-3 of an advantage in the public code; " + _NAN,
    ),
    LossEntry(
        "rloo_advantages",
        "function",
        "Credit relative to the mean of the other samples",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        "R_i - mean of the others (eq. 6)",
        "none",
        "TRL 1.16.0 formula",
        "1e-6 (value)",
        _NAN,
    ),
    LossEntry(
        "generalized_advantages",
        "function",
        "Generalised advantage estimation on flat sequences",
        "Schulman et al. 2015, arXiv 1506.02438",
        "sum_l (gamma lam)^l delta_{t+l} (eq. 16)",
        "none",
        "OpenRLHF's formula in float64",
        "1e-12 (value)",
        "A sequence that was cut ends with the value of the state it came to",
    ),
    LossEntry(
        "decoupled_advantages",
        "function",
        "Answer words and confidence words judged apart",
        "Ma et al. 2026, arXiv 2603.09117",
        "A_t = A_confidence where the token states it, else A_answer",
        "none",
        "float64 formula",
        "0 (value)",
        "One gather, where the authors' code loops over rows and tokens",
    ),
)

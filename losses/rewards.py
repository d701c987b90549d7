"""Rewards that make it pay to be right and to say how sure one is: pure functions of grades and confidences.

A confidence reward is honest when it is proper: whatever the true probability of being right, stating that one earns
most. A reward linear in the confidence, or the absolute error, is not: it pays for stating 0 or 1.

That holds for a confidence that is stated, hence sampled: the policy learns which statement earns most. One that is a
function of the weights, as the likelihood of the answer is, learns nothing from a reward, which is a constant to it: its
score is a loss (`calibtrain.losses.AnswerScoreLoss`), and docs/rewards.md says where training ends.

Where one reward serves answer and confidence together, a second rule holds: being right must be worth more than being
wrong, whatever confidence goes with each. Otherwise "be wrong on purpose and say 0" wins. `check_accuracy_weight` says so
before training does. With decoupled credit (`calibtrain.losses.advantages.decoupled_advantages`) the rule is moot: give
`proper_score` to the confidence's words alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.advantages import leave_one_out_mean
from calibtrain.losses.catalog import LossEntry
from calibtrain.ops import at_least_float32

Score = Literal["brier", "log"]

CLIP = 1e-3
"""Confidences are held inside [CLIP, 1 - CLIP] by the log score, whose penalty is otherwise without bound."""


def proper_score(confidence: Tensor, target: Tensor, *, score: Score = "brier", clip: float = CLIP) -> Tensor:
    """What a stated confidence earns: -(q - c)^2 (Brier 1950), or c log q + (1 - c) log(1 - q) (Good 1952), q clipped.

    Differentiable in the confidence but where it is clipped, for a head that is trained by it.

    Both (S,) in [0, 1]; `target` is the grade, or the target of `confidence_target`. Returns (S,), at most 0. On average
    most is earned at q = the mean of the target. UserError outside [0, 1].
    """
    _check_score(score)
    _check_unit(confidence, "confidence")
    _check_unit(target, "target")
    confidence = at_least_float32(confidence)
    if score == "brier":
        return -(confidence - target).square()
    q = confidence.clamp(clip, 1.0 - clip)
    return target * q.log() + (1.0 - target) * torch.log1p(-q)


def worst_score(score: Score = "brier", clip: float = CLIP) -> float:
    """The least that `proper_score` ever gives: sure, and wrong."""
    _check_score(score)
    return -1.0 if score == "brier" else math.log(clip)


def least_accuracy_weight(score_weight: float, *, score: Score = "brier", clip: float = CLIP) -> float:
    """Smallest weight a of correctness in a * c + b * S(q, c) at which right is never worth less than wrong, b given.

    From a + b min_q S(q, 1) >= b max_q S(q, 0): b for the Brier score, b log((1 - clip) / clip) for the log score (6.9 b
    at 1e-3). It is also where an honest answer's expected reward stops falling as its chance to be right grows.
    """
    best_wrong = 0.0 if score == "brier" else math.log1p(-clip)
    return score_weight * (best_wrong - worst_score(score, clip))


def check_accuracy_weight(
    accuracy_weight: float, score_weight: float, *, score: Score = "brier", clip: float = CLIP
) -> None:
    """Raise UserError where being wrong on purpose, and saying so, would beat an honest attempt."""
    least = least_accuracy_weight(score_weight, score=score, clip=clip)
    if accuracy_weight < least * (1.0 - 1e-12):
        raise UserError(
            f"accuracy_weight: {accuracy_weight:g} is too small beside score_weight: {score_weight:g} for the {score} "
            f"score: wrong on purpose with confidence 0 would earn more than an honest try; give at least {least:.4g}, or "
            "let the score reach the confidence's words alone (decoupled credit)"
        )


def check_any_weight(accuracy_weight: float, score_weight: float) -> None:
    """Raise UserError where every answer would earn the same."""
    if accuracy_weight == 0 and score_weight == 0:
        raise UserError("accuracy_weight and score_weight are both 0: every answer would earn 0, and nothing be learnt")


def calibrated_reward(
    correct: Tensor,
    confidence: Tensor,
    *,
    score: Score = "brier",
    accuracy_weight: float = 1.0,
    score_weight: float = 1.0,
    clip: float = CLIP,
) -> Tensor:
    """Correctness and confidence, a * c + b * S(q, c); RLCR is Brier with a = b (Damani et al. 2025, arXiv 2507.16806).

    `correct` (S,) in [0, 1], NaN where nobody could grade (the reward is NaN there too); `confidence` (S,) in [0, 1].
    Returns (S,). Raises UserError as `check_accuracy_weight` and `check_any_weight` do.
    """
    check_any_weight(accuracy_weight, score_weight)
    check_accuracy_weight(accuracy_weight, score_weight, score=score, clip=clip)
    return accuracy_weight * correct + score_weight * proper_score(confidence, correct, score=score, clip=clip)


def confidence_target(correct: Tensor, group_ids: Tensor, mixing: float = 0.5) -> Tensor:
    """What a confidence is scored against: mixing * (mean grade of the other samples) + (1 - mixing) * own grade.

    Its mean is mixing * (how often the policy is right on this question) + (1 - mixing) * (how often this answer is), with
    less noise than the own grade: this answer's chance to be right for mixing = 0, and for any where the samples give one
    answer. The own sample is not counted again among the others. The target of DCPO (Ma et al. 2026, arXiv 2603.09117),
    which scores it by the absolute error and so asks for a median: score it with `proper_score`. `correct` (S,), NaN where
    ungraded; `group_ids` (S,) int64. Returns (S,) without gradient.
    """
    if not 0.0 <= mixing <= 1.0:
        raise UserError(f"mixing: {mixing} is not between 0 and 1")
    own = correct.detach()
    return mixing * leave_one_out_mean(own, group_ids).to(own) + (1.0 - mixing) * own


def ternary_reward(correct: Tensor, abstained: Tensor, target_risk: float) -> Tensor:
    """+1 right, 0 abstained, -(1 - target_risk) / target_risk wrong (cf. TruthRL: Wei et al. 2025, arXiv 2509.25760).

    Worth answering exactly when the chance to be right is above 1 - target_risk, so that at most `target_risk` of the
    given answers are wrong. `correct` (S,) in [0, 1] or NaN; `abstained` (S,) bool. Returns (S,); an ungraded answer is NaN.
    """
    if not 0.0 < target_risk < 1.0:
        raise UserError(f"target_risk: {target_risk} is not between 0 and 1")
    penalty = (1.0 - target_risk) / target_risk
    return torch.where(abstained, 0.0, correct - penalty * (1.0 - correct))


def with_format_penalty(rewards: Tensor, well_formed: Tensor, *, penalty: float, worst: float) -> Tensor:
    """`rewards` (S,) where `well_formed` (S,) bool, else `penalty`.

    `worst` is the least reward that any well-formed answer can have. Raises UserError unless `penalty` is below it: an
    answer that states no confidence would else be better off than one that is sure and wrong, and silence would pay.
    """
    if not penalty < worst:
        raise UserError(
            f"format penalty: {penalty:g} must be below {worst:g}, the worst that a well-formed answer can earn; otherwise "
            "leaving the confidence out pays"
        )
    return torch.where(well_formed, rewards, penalty)


def ppo_c_reward(
    rewards: Tensor,
    confidence: Tensor,
    threshold: Tensor | float,
    *,
    weight: float = 0.5,
    mode: Literal["threshold", "difference"] = "threshold",
) -> Tensor:
    """PPO-C as published (Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724): a stated confidence q shifts a model's reward r.

    "threshold": r + sign * weight * |r| * (q - 0.5), sign +1 where r >= threshold, else -1; "difference": r + weight *
    (r - threshold) * (q - 0.5). `rewards`, `confidence` (S,), q = 0.5 where none is stated; `threshold` is the running mean
    of the rewards (`running_mean`). Returns (S,). Both are linear in q, so that training ends at 0 and 1: they are here to
    compare with; `ppo_c_proper_reward` is the one to train on.
    """
    if mode not in ("threshold", "difference"):
        raise UserError(f"mode must be threshold|difference, got {mode!r}")
    _check_unit(confidence, "confidence")
    rewards, confidence = at_least_float32(rewards), at_least_float32(confidence)
    if mode == "difference":
        return rewards + weight * (rewards - threshold) * (confidence - 0.5)
    sign = torch.where(rewards >= threshold, 1.0, -1.0)
    return rewards + sign * weight * rewards.abs() * (confidence - 0.5)


def ppo_c_proper_reward(
    rewards: Tensor, confidence: Tensor, threshold: Tensor | float, *, weight: float = 0.5, scale: float | None = None
) -> Tensor:
    """PPO-C with a proper score: r - weight * (q - target)^2.

    The target is 1 where r >= threshold, else 0; with `scale` it is sigmoid(scale * (r - threshold)), the probability that a
    Bradley-Terry model (`fit_pair_scale`) gives to this answer against an average one. Shapes as in `ppo_c_reward`.
    """
    _check_unit(confidence, "confidence")
    rewards, confidence = at_least_float32(rewards), at_least_float32(confidence)
    gap = (rewards - threshold).detach()
    target = (gap >= 0.0).to(confidence) if scale is None else torch.sigmoid(scale * gap)
    return rewards - weight * (confidence - target).square()


def running_mean(previous: float, rewards: Tensor, *, rate: float = 0.1) -> float:
    """PPO-C's threshold for the batch after this one: rate * mean(rewards) + (1 - rate) * previous.

    Give it the rewards (S,) of all ranks, and use `previous` for the batch itself: a batch must not move the threshold that
    it is judged by. NaN rewards are left out; without any the mean stays.
    """
    kept = rewards.detach()[~rewards.isnan()].double()
    return previous if kept.numel() == 0 else rate * float(kept.mean()) + (1.0 - rate) * previous


def _check_score(score: str) -> None:
    if score not in ("brier", "log"):
        raise UserError(f"score must be brier|log, got {score!r}; a linear score or the absolute error is not proper")


def _check_unit(values: Tensor, name: str) -> None:
    if bool(((values < 0.0) | (values > 1.0)).any()):  # NaN passes: an ungraded answer
        raise UserError(f"{name}: values must be in [0, 1], found {float(values.min()):g} to {float(values.max()):g}")


def _entry(name: str, title: str, paper: str, equation: str, against: str, deviation: str, differs: str) -> LossEntry:
    return LossEntry(name, "reward", title, paper, equation, "none", against, deviation, differs)


CATALOG = (
    _entry(
        "calibrated_reward",
        "Correctness plus the Brier score of a stated confidence (RLCR), or plus the log score",
        "Damani et al. 2025, arXiv 2507.16806; log score: Bani-Harouni et al. 2025, arXiv 2503.02623",
        "a c - b (q - c)^2",
        "float64 formula of the authors' code",
        "1e-12 (value)",
        "Weights under which being wrong on purpose pays are an error: RLCR's a = b is the boundary, and Rewarding Doubt's "
        "0.86 to 1 is far below the log score's 6.9, harmless there only because its answers are not trained",
    ),
    _entry(
        "confidence_target",
        "Target of a confidence from the other samples of the question",
        "Ma et al. 2026, arXiv 2603.09117",
        "lam mean + (1 - lam) own",
        "float64 formula",
        "1e-12 (value)",
        "The mean leaves the own sample out, and the score is squared: the absolute error asks for a median (.85 at p = .7)",
    ),
    _entry(
        "ternary_reward",
        "Right, abstained or wrong, with the price of a wrong answer set by a target risk",
        "Wei et al. 2025, arXiv 2509.25760",
        "+1, 0, -(1 - risk) / risk",
        "float64 formula",
        "0 (value)",
        "The price follows from the risk that may be run, where the paper's is -1 (a risk of one half)",
    ),
    _entry(
        "ppo_c_reward",
        "Reward shifted by stated confidence, as published",
        "Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724",
        "r ± w |r| (q - 1/2), or r + w (r - mean)(q - 1/2)",
        "float64 formula of the authors' code",
        "1e-12 (value)",
        "The threshold is that of the batches before, over all ranks; the authors' moves first, and apart on each rank",
    ),
    _entry(
        "ppo_c_proper_reward",
        "PPO-C with a squared score, honest where the published one asks for 0 or 1",
        "after Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724",
        "r - w (q - target)^2",
        "float64 formula",
        "1e-12 (value)",
        "A proper score in place of a linear one",
    ),
    _entry(
        "with_format_penalty",
        "An answer out of format earns less than the worst one in format",
        "after Damani et al. 2025, arXiv 2507.16806",
        "penalty < worst",
        "float64 formula",
        "0 (value)",
        "A penalty that leaves silence worthwhile is an error",
    ),
)

"""Calibration while training: of the tokens to learn, of the model's own graded answers, and of its preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import CalibrationState
from calibtrain.hooks.base import Hook
from calibtrain.hooks.records import MicroBatchRecord
from calibtrain.losses.orpo import log_odds
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED, sequence_sums, sequence_token_counts

Samples = tuple[Tensor, Tensor, Tensor]  # confidence, correct, weight

TOKEN_SUMS = ("tokens", "logprob", "entropy", "brier")
SEQUENCE_SUMS = ("chosen", "chosen_logprob", "rejected", "rejected_logprob", "pairs", "preferred", "margin")


class CalibrationHook(Hook):
    """`calib/train/token/*`, `calib/train/answer/*` (see `calibtrain.calibration.metrics.summary`) and `train/*` means.

    Tokens: the completion tokens of CHOSEN sequences; confidence is the largest probability, correct whether it was the
    target's. Answers: the ANSWER sequences; confidence is the probability of the whole answer, correct its grade.
    Preferences: mean log-probs of chosen and rejected completions; where pair ids are given, how often the chosen one
    is likelier per token, and the mean log odds ratio (Hong, Lee, Thorne 2024, arXiv 2403.07691).

    Samples stay on the device until the log interval ends: `on_micro_batch` never waits for it.
    """

    name = "calibration"

    def __init__(self) -> None:
        self._token, self._answer = CalibrationState(), CalibrationState()
        self._waiting: dict[str, list[Samples]] = {"token": [], "answer": []}
        self._means: Tensor = torch.zeros(len(TOKEN_SUMS) + len(SEQUENCE_SUMS), dtype=torch.float64)

    @torch.no_grad()
    def on_micro_batch(self, record: MicroBatchRecord) -> None:
        """Keep the samples and add the sums, without waiting for the device."""
        learned = record.is_completion & (record.roles == CHOSEN)[record.sequence_ids]
        self._waiting["token"].append((record.confidence, record.correct, learned))
        tokens = sequence_token_counts(record.is_completion, record.sequence_ids, record.roles.shape[0])
        logprob = torch.where(record.is_completion, record.logprob, 0.0).double()
        sequence_logprob = sequence_sums(logprob, record.sequence_ids, record.roles.shape[0])
        graded = (record.roles == ANSWER) & (tokens > 0) & ~record.sequence_correct.isnan()
        self._waiting["answer"].append(
            (sequence_logprob.clamp(max=0.0).exp(), record.sequence_correct.nan_to_num(0.0), graded)
        )
        sums = torch.cat([_token_sums(record, learned), _preference_sums(record, sequence_logprob, tokens)])
        self._means = self._means.to(sums.device) + sums

    def sums(self) -> dict[str, Tensor]:
        """Both calibration states' tensors and the sums behind the means."""
        self._flush()
        states = {"token": self._token, "answer": self._answer}
        tensors = {f"{kind}/{name}": t for kind, state in states.items() for name, t in state.tensors().items()}
        return {**tensors, "means": self._means}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Calibration metrics of what there is: a kind without samples has no keys."""
        metrics = {}
        for kind in ("token", "answer"):
            prefix = f"{kind}/"
            tensors = {key.removeprefix(prefix): t for key, t in sums.items() if key.startswith(prefix)}
            state = CalibrationState.from_tensors(tensors)
            if state.n:
                metrics.update({f"calib/train/{kind}/{key}": value for key, value in summary(state).items()})
        return {**metrics, **_means(dict(zip(TOKEN_SUMS + SEQUENCE_SUMS, sums["means"].tolist(), strict=True)))}

    def reset(self) -> None:
        """Start the next interval."""
        self._token, self._answer = CalibrationState(), CalibrationState()
        self._waiting = {"token": [], "answer": []}
        self._means = torch.zeros_like(self._means)

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last log, so that the first log after a resume is the one of an unbroken run."""
        self._flush()
        return {"token": self._token.state_dict(), "answer": self._answer.state_dict(), "means": self._means.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._token.load_state_dict(state["token"])
        self._answer.load_state_dict(state["answer"])
        self._means = state["means"].clone()

    def _flush(self) -> None:
        for state, samples in ((self._token, self._waiting["token"]), (self._answer, self._waiting["answer"])):
            if samples:
                confidence, correct, weight = (torch.cat(parts) for parts in zip(*samples, strict=True))
                # A forward pass that overflowed is skipped by the trainer; here it must not end the measuring.
                state.update(confidence.clamp(0.0, 1.0), correct, weight & confidence.isfinite())
                samples.clear()


def _token_sums(record: MicroBatchRecord, learned: Tensor) -> Tensor:
    """Sums of TOKEN_SUMS over the learned tokens; Brier of the whole distribution is 1 - 2 p_y + sum_v p_v^2."""
    brier = 1 - 2 * record.logprob.double().exp() + record.sum_p2
    values = [torch.ones_like(brier), record.logprob, record.entropy, brier]
    return torch.stack([torch.where(learned, value.double(), 0.0).sum() for value in values])


def _preference_sums(record: MicroBatchRecord, sequence_logprob: Tensor, tokens: Tensor) -> Tensor:
    """Sums of SEQUENCE_SUMS; `sequence_logprob` (S,) float64, `tokens` (S,) int64."""
    mean = sequence_logprob / tokens.clamp(min=1)
    chosen, rejected = ((record.roles == role) & (tokens > 0) for role in (CHOSEN, REJECTED))
    sums = [part for mask in (chosen, rejected) for part in (mask.sum().to(mean), torch.where(mask, mean, 0.0).sum())]
    if record.pair_ids is None:
        return torch.stack([*sums, *mean.new_zeros(3)])
    odds = log_odds(mean)
    pair_ids, slots = record.pair_ids, record.pair_ids.clamp(min=0)

    def by_pair(mask: Tensor, values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add(0, slots, torch.where(mask & (pair_ids >= 0), values, 0.0))

    ones = torch.ones_like(odds)
    complete = (by_pair(chosen, ones) == 1) & (by_pair(rejected, ones) == 1)
    margin = torch.where(complete, by_pair(chosen, odds) - by_pair(rejected, odds), 0.0)
    return torch.stack([*sums, complete.sum().to(mean), (margin > 0).sum().to(mean), margin.sum()])


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """`train/*` means of what has a count."""
    metrics: dict[str, float] = {}
    if tokens := sums["tokens"]:
        metrics["train/token/n"] = tokens
        metrics.update({f"train/token/{name}": sums[name] / tokens for name in ("logprob", "entropy", "brier")})
    for role in ("chosen", "rejected"):
        if sums[role]:
            metrics[f"train/preference/{role}_logprob"] = sums[f"{role}_logprob"] / sums[role]
    if pairs := sums["pairs"]:
        metrics["train/preference/accuracy"] = sums["preferred"] / pairs
        metrics["train/preference/log_odds_ratio"] = sums["margin"] / pairs
    return metrics

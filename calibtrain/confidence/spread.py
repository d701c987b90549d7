"""Sources that come along with the answer: its likelihood, whole or by token, and how spread its tokens' chances are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from calibtrain.confidence.answered import Answered
from calibtrain.confidence.source import Array, Asker, Cost, SourceScores
from calibtrain.models.loss_model import SpreadStep
from calibtrain.records import Record

CHUNK = 512
"""Tokens whose (tokens, vocabulary) logits are held at once."""


def likelihoods(asker: Asker, records: Sequence[Record], answered: Answered) -> dict[str, SourceScores]:
    """Five readings of the answer's T tokens, with its end token where it ends the reply, from the hidden states that
    answering left. Of a reasoning they read the answer alone, given the reasoning; `chains` reads all of it.

    `likelihood` exp(sum log p) is the chance of exactly this answer; `likelihood_mean` exp(sum log p / T) does not shrink
    with length; `likelihood_min` is the smallest p; `likelihood_margin` the mean of p1 - p2, the two likeliest tokens;
    `likelihood_entropy` exp(-H), H the mean entropy in nats. All but the first are scores to rank by. No forward pass.
    """
    owner = answered.features.sequence_ids.numpy()
    n, count = len(answered.answers), np.bincount(owner, minlength=len(answered.answers))
    logprob = np.array([value for answer in answered.answers for value in answer.token_logprobs], dtype=np.float64)
    entropy, margin = _spread(asker, answered)
    smallest = np.full(n, np.inf)
    np.minimum.at(smallest, owner, logprob)
    total = np.bincount(owner, logprob, n)
    values = {
        "likelihood": np.array([answer.confidence for answer in answered.answers], dtype=np.float64),
        "likelihood_mean": np.exp(total / count),
        "likelihood_min": np.exp(smallest),
        "likelihood_margin": np.bincount(owner, margin, n) / count,
        "likelihood_entropy": np.exp(-np.bincount(owner, entropy, n) / count),
    }
    return {
        name: SourceScores(np.clip(one, 0.0, 1.0), Cost.none(n), name == "likelihood") for name, one in values.items()
    }


@torch.no_grad()
def _spread(asker: Asker, answered: Answered) -> tuple[Array, Array]:
    """Entropy in nats and margin of each token's distribution, (T,) float64."""
    entropies, margins = [], []
    for hidden in answered.features.hidden.split(CHUNK):
        entropy, top = asker.module(SpreadStep(hidden.to(asker.device)))
        entropies.append(entropy.double().cpu())
        probability = top.double().exp().cpu()
        margins.append(probability[:, 0] - probability[:, 1])
    return torch.cat(entropies).numpy(), torch.cat(margins).numpy()

"""Sources that read the whole reply, the reasoning before its answer too; `likelihood` reads the answer alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibtrain.confidence.answered import Answered
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.records import Record


def chains(asker: Asker, records: Sequence[Record], answered: Answered) -> dict[str, SourceScores]:
    """Two readings of the T tokens of the whole reply, thinking and end token among them. No forward pass.

    `likelihood_chain` exp(sum log p) is the chance of exactly this reply, and so no more than the answer's: it falls
    exponentially with T (0.9 a token is 1e-9 at 200 tokens), tells long chains from short ones as much as sure from unsure,
    and is 0 below e^-745. `likelihood_chain_mean` exp(sum log p / T) does not shrink with length, but the many tokens that
    only word the reasoning drown the few that decide. Both are scores to rank by. Where the answer is the whole reply they
    are `likelihood` and `likelihood_mean`.
    """
    n = len(answered.answers)
    total = np.array([one.chain_logprob for one in answered.answers], dtype=np.float64)
    count = np.array([one.chain_length for one in answered.answers], dtype=np.float64)
    values = {"likelihood_chain": np.exp(total), "likelihood_chain_mean": np.exp(total / np.maximum(count, 1.0))}
    return {name: SourceScores(np.clip(one, 0.0, 1.0), Cost.none(n), False) for name, one in values.items()}

"""Which records each step, rank and micro-batch sees: pure functions of integers, so that a resume needs no state.

The data is one endless stream of shuffled epochs; step k takes its records k * B ... (k + 1) * B - 1, also across the
end of an epoch, so that every step has exactly B records and `consumed = step * B` says all there is to say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

from calibtrain.errors import UserError


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Permutation of range(n) for one epoch (from 0): the same on every machine and version."""
    # random() is the one stream that Python promises to keep, unlike shuffle() and the generators of numpy and torch.
    draw = random.Random(f"epoch order {seed} {epoch}").random
    keys = [draw() for _ in range(n)]
    return tuple(sorted(range(n), key=keys.__getitem__))


def step_indices(step: int, global_batch_size: int, n: int, seed: int) -> list[int]:
    """Indices of the records of one optimiser step (from 0), over all ranks. Raises UserError if there are none."""
    if n < 1:
        raise UserError("there is no record to train on: the data set is empty, or every row was dropped")
    first = step * global_batch_size
    indices: list[int] = []
    while len(indices) < global_batch_size:
        epoch, offset = divmod(first + len(indices), n)
        indices.extend(epoch_order(n, seed, epoch)[offset : offset + global_batch_size - len(indices)])
    return indices


def total_steps(n: int, epochs: float, global_batch_size: int) -> int:
    """Optimiser steps that show each record `epochs` times (the last one runs on into the next epoch); at least 1."""
    return max(1, math.ceil(round(n * epochs, 6) / global_batch_size))


def epoch_at(step: int, global_batch_size: int, n: int) -> float:
    """Epochs consumed after `step` optimiser steps."""
    return step * global_batch_size / n


def rank_micro_batches(indices: Sequence[int], rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """One rank's micro-batches: contiguous, so that 1 rank x 8 and 2 ranks x 4 run the same micro-batches.

    Raises UserError if the global batch is not a whole number of micro-batches on each rank.
    """
    if len(indices) % (world_size * micro_batch_size):
        raise UserError(
            f"training.global_batch_size {len(indices)} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"{world_size} ranks; change one of them"
        )
    per_rank = len(indices) // world_size
    mine = indices[rank * per_rank : (rank + 1) * per_rank]
    return [list(mine[i : i + micro_batch_size]) for i in range(0, per_rank, micro_batch_size)]

"""Which records each step, rank and micro-batch sees: pure functions of integers, so that a resume needs no state.

The data is one endless stream of shuffled epochs; step k takes its records k * B ... (k + 1) * B - 1, also across the
end of an epoch, so that every step has exactly B records and `consumed = step * B` says all there is to say.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from functools import lru_cache

from calibtrain.config import TrainingConfig
from calibtrain.errors import UserError


def permutation(n: int, key: str) -> list[int]:
    """Permutation of range(n), a pure function of `key`: the same on every machine and version."""
    # random() is the one stream that Python promises to keep, unlike shuffle() and the generators of numpy and torch.
    draw = random.Random(key).random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> array[int]:
    """Permutation of range(n) for one epoch (from 0)."""
    return array("q", permutation(n, f"epoch order {seed} {epoch}"))


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


def planned_steps(training: TrainingConfig, n: int, global_batch_size: int, passes: int = 1) -> int:
    """Optimiser steps of a run over n records: `max_steps` where it is given, else those of the epochs.

    `passes`: how many steps take each record while an epoch goes by once.
    """
    return training.max_steps or passes * total_steps(n, training.epochs, global_batch_size)


def epoch_at(step: int, global_batch_size: int, n: int, passes: int = 1) -> float:
    """Epochs consumed after `step` optimiser steps."""
    return step * global_batch_size / (n * passes)


def rank_micro_batches(
    indices: Sequence[int], lengths: Sequence[int], world_size: int, micro_batch_size: int, *, packed: bool = False
) -> list[list[list[int]]]:
    """The micro-batches of each rank for the records of one step, whose `lengths` (tokens) stand beside them.

    Padded micro-batches hold records of like length, packed ones like sums of tokens; both are dealt out so that the
    ranks have as much to do, at each turn and in all, the most first. They do not depend on how many ranks there are,
    so 1 rank x 8 and 2 ranks x 4 differ only in the order of the sum. Raises UserError if the records are not a whole
    number of micro-batches on each rank.
    """
    if len(indices) % (world_size * micro_batch_size):
        raise UserError(
            f"training.global_batch_size {len(indices)} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"{world_size} ranks; change one of them"
        )
    cut = _cut_even if packed else _cut_alike
    micro_batches = cut(sorted(range(len(indices)), key=lambda i: (-lengths[i], i)), lengths, micro_batch_size)
    costs = [(sum if packed else max)(lengths[i] for i in one) for one in micro_batches]
    order = sorted(range(len(micro_batches)), key=lambda m: (-costs[m], m))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for start in range(0, len(order), world_size):
        least_first = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, m in zip(least_first, order[start : start + world_size], strict=True):
            ranks[rank].append([indices[i] for i in sorted(micro_batches[m])])
            loads[rank] += costs[m]
    return ranks


def _cut_alike(longest_first: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Neighbours in length: no other cut has less padding."""
    return [list(longest_first[i : i + size]) for i in range(0, len(longest_first), size)]


def _cut_even(longest_first: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Each record to the micro-batch with the fewest tokens that has room."""
    micro_batches: list[list[int]] = [[] for _ in range(len(longest_first) // size)]
    tokens = [0] * len(micro_batches)
    for i in longest_first:
        m = min((m for m, one in enumerate(micro_batches) if len(one) < size), key=lambda m: (tokens[m], m))
        micro_batches[m].append(i)
        tokens[m] += lengths[i]
    return micro_batches

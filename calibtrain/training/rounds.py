"""Which groups of sampled answers each step learns from: pure functions of integers, so that a resume needs no state.

A round asks questions for several mini-batches at once, and is passed over several times. Group k is what was sampled to
the k-th question of its round.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from calibtrain.data.loader import permutation, step_indices


@dataclass(frozen=True, slots=True)
class Rounds:
    """How a run's steps are cut into rounds of sampling."""

    questions: int  # in the training split
    per_step: int  # groups that an optimiser step learns from, over all ranks
    steps: int = 1  # mini-batches of a round
    epochs: int = 1  # passes over a round
    seed: int = 0

    @property
    def length(self) -> int:
        """Optimiser steps from one round of sampling to the next."""
        return self.steps * self.epochs

    def begins(self, step: int) -> bool:
        """Whether answers are sampled before this step (from 0)."""
        return step % self.length == 0

    def asked(self, step: int) -> list[int]:
        """Questions of the round of a step, in order: rounds take up one endless stream of shuffled epochs."""
        first = step // self.length * self.steps
        places = range(first, first + self.steps)
        return [i for place in places for i in step_indices(place, self.per_step, self.questions, self.seed)]

    def groups(self, step: int) -> list[int]:
        """Numbers of the groups that a step learns from. The first pass takes a round as it was asked, others shuffle it."""
        number, place = divmod(step, self.length)
        passed, mini_batch = divmod(place, self.steps)
        size = self.steps * self.per_step
        order = permutation(size, f"pass {self.seed} {number} {passed}") if passed else list(range(size))
        return order[mini_batch * self.per_step : (mini_batch + 1) * self.per_step]

    def others(self, step: int, attempt: int, count: int, asked: Collection[int]) -> list[int]:
        """`count` questions to ask in the place of some of a round; none of those `asked`, while there are others."""
        order = permutation(self.questions, f"asked anew {self.seed} {step // self.length} {attempt}")
        fresh = [i for i in order if i not in asked] or order
        return [fresh[k % len(fresh)] for k in range(count)]

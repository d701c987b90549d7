"""The rewards of a run: their sources asked of each round's answers, and what the next round must know of this one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.stated import read_statement
from calibtrain.config import RunConfig
from calibtrain.distributed import gather_lists
from calibtrain.errors import EngineFailure
from calibtrain.records import Record
from calibtrain.training.reward_memory import NOTHING, Memory
from calibtrain.training.reward_sources import Reply, Source, build_sources, source_names
from calibtrain.training.rollout_rewards import (
    earning,
    proxy_of,
    remembered,
    source_values,
    threshold_of,
    worth_of,
)
from calibtrain.training.samples import Sample

logger = logging.getLogger(__name__)


class RewardRounds:
    """Asks the sources, and keeps the memory of rewards from round to round. Making it is collective.

    `memory` is that of the rounds before the present one. A checkpoint within a round has that one, and the round's samples,
    from which `end` makes the next; a checkpoint behind it has the next.
    """

    def __init__(self, config: RunConfig, answerer: Answerer, questions: Sequence[Record]) -> None:
        self.config, self.answerer, self.questions = config, answerer, questions
        self.sources: list[Source] = build_sources(config, answerer.template, answerer.world)
        self.names = source_names(config.rollouts.paid_by)
        self.memory = self._next = NOTHING
        self._told_gap = False

    def measured(self, samples: list[Sample]) -> list[Sample]:
        """This rank's samples with what sources give. Raises EngineFailure on every rank where one fails. Collective."""
        if not self.sources:
            return samples
        decode = self.answerer.template.decode_answer
        replies = [self.reply(self.questions[one.question], decode(one.tokens)) for one in samples]
        given = self.asked(replies)
        return [replace(one, rewards=row) for one, row in zip(samples, given, strict=True)]

    def asked(self, replies: Sequence[Reply]) -> list[tuple[float, ...]]:
        """What each asked source gives for each reply. Raises EngineFailure as `measured` does. Collective."""
        columns = [source(replies) for source in self.sources]
        problems = [found for source in self.sources if (found := source.problem()) is not None]
        if problems := gather_lists(problems):
            raise EngineFailure(problems[0])
        return list(zip(*columns, strict=True))

    def reply(self, record: Record, text: str) -> Reply:
        """A reply as sources read it."""
        scored = self.config.rollouts.scores_statement
        return Reply(record, text, read_statement(text).answer if scored else text)

    def begin(self) -> None:
        """A round begins: what the last one left is the past."""
        self.memory = self._next

    def end(self, samples: Sequence[Sample], ids: Tensor) -> dict[str, float]:
        """Remember a round of all ranks, and its numbers: means of the sources and how well each tells right from wrong."""
        memory = self._next = remembered(samples, ids, self.config, self.memory)
        if memory.warned and not self.memory.warned and self.answerer.world.is_main:
            logger.warning(
                "rollouts: over the last %d rounds the reward rose from %.3g to %.3g while the share of right answers fell "
                "from %.2f to %.2f: the policy learns to please what rewards it, not to be right. Stop at an earlier "
                "checkpoint, raise objective.beta, or add the grade to rollouts.sources",
                rounds := memory.over_optimised,
                memory.proxy[-rounds],
                memory.proxy[-1],
                memory.correct[-rounds],
                memory.correct[-1],
            )
        return self._numbers(samples, ids)

    def state_dict(self, *, within_round: bool) -> dict[str, Any]:
        """JSON values; {} where there is nothing to remember."""
        return (self.memory if within_round else self._next).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the memory of a checkpoint."""
        self.memory = self._next = Memory.loaded(state)

    def _numbers(self, samples: Sequence[Sample], ids: Tensor) -> dict[str, float]:
        sources, values = self.config.rollouts.paid_by, source_values(samples, self.config)
        found: dict[str, float] = {}
        grades = torch.tensor([one.correct for one in samples], dtype=torch.float64)
        for name, source, row in zip(self.names, sources, values, strict=True):
            if len(sources) == 1 and not source.ASKED:
                continue  # the grade, which is among the round's means
            found[f"source_{name}"] = float(row.nanmean())
            if source.PROXY:
                found[f"source_{name}_auroc"] = score_auroc(row, grades)
                found[f"source_{name}_missing"] = float(row.isnan().double().mean())
        if (proxy := proxy_of(sources, values)) is not None:
            found["proxy"] = proxy
        if self.config.rollouts.reward == "ppo_c":
            found |= self._threshold(samples, ids)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _threshold(self, samples: Sequence[Sample], ids: Tensor) -> dict[str, float]:
        """PPO-C's threshold, and by how much rewards above it are larger than those below."""
        rollouts = self.config.rollouts
        earns = earning(samples, self.config)
        worth = worth_of(samples, ids, self.config, self.memory)
        threshold = threshold_of(worth, earns, self.memory)
        worth = worth[earns]
        above = worth >= threshold
        gap = float(worth[above].mean() - worth[~above].mean()) if bool(above.any() and (~above).any()) else math.nan
        joint = rollouts.ppo_c.form == "proper" and not rollouts.decoupled
        if joint and gap < rollouts.ppo_c.weight and not self._told_gap and self.answerer.world.is_main:
            self._told_gap = True
            logger.warning(
                "rollouts.ppo_c.weight: %g, but rewards above the threshold are only %.3g more than those below: a poor "
                "answer that the policy is sure of can earn more than a good one that it is not; lower the weight, set "
                "normalize: true, or decouple the credit",
                rollouts.ppo_c.weight,
                gap,
            )
        return {"ppo_c_threshold": threshold, "ppo_c_above": float(above.double().mean()), "ppo_c_gap": gap}


def score_auroc(scores: Tensor, grades: Tensor) -> float:
    """Chance that a right answer scores higher than a wrong one, ties half; both (S,), NaN left out; NaN with one kind."""
    kept = ~(scores.isnan() | grades.isnan())
    right, wrong = scores[kept & (grades > 0.5)].double(), scores[kept & (grades <= 0.5)].double().sort().values
    if not (right.numel() and wrong.numel()):
        return math.nan
    below, up_to = (torch.searchsorted(wrong, right, right=side).double() for side in (False, True))
    return float((0.5 * (below + up_to)).mean() / wrong.numel())

"""Unpaired answers, and the reference point that each step compares them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from calibtrain.confidence.answering import Answerer
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.loader import step_indices
from calibtrain.distributed import gather_lists, shard
from calibtrain.losses.kto import kto_reference_point
from calibtrain.losses.terms import Batch, sequence_sums
from calibtrain.models.loss_model import LogprobStep
from calibtrain.training.deepspeed_config import BatchPlan


class UnpairedExamples(Sequence[tuple[Encoded, ...]]):
    """Item i: the i-th labelled answer.

    Before each step the policy reads the step's prompts with answers to others, without gradient, over all ranks: their
    mean log ratio to the reference is the step's reference point, however it is cut into micro-batches. `examples` are
    (labelled, mismatched), both with reference log-probs.
    """

    def __init__(self, examples: Sequence[tuple[Encoded, ...]], answerer: Answerer, plan: BatchPlan, seed: int) -> None:
        self.examples, self.answerer, self.plan, self.seed = examples, answerer, plan, seed
        self.metrics: dict[str, float] = {}
        self._point = torch.zeros(())

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Encoded, ...]:  # type: ignore[override]
        return self.examples[index][:1]

    def before_step(self, step: int) -> None:
        """Measure the reference point of `step` (from 0). Collective: every rank makes as many passes."""
        indices = step_indices(step, self.plan.global_batch_size, len(self), self.seed)
        # A group that shares its rows has one share: by ranks they might not go round.
        world = self.answerer.world.groups_of(self.plan.sequence_parallel_size)
        mine = shard([self.examples[index][1] for index in indices], world)
        model = self.answerer.module
        was_training = model.training
        model.eval()
        try:
            ratios = [
                ratio
                for start in range(0, len(mine), self.plan.micro_batch_size)
                for ratio in self._log_ratios(mine[start : start + self.plan.micro_batch_size])
            ]
        finally:
            model.train(was_training)
        point = kto_reference_point(torch.tensor(gather_lists(ratios), dtype=torch.float64))
        self.metrics = {"reference_point": float(point)}
        self._point = point.float()

    def fill(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The batch with the step's reference point."""
        return replace(batch, reference_point=self._point)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each step measures its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""

    def close(self) -> None:
        """Nothing was started."""

    def _log_ratios(self, sequences: Sequence[Encoded]) -> list[float]:
        batch = collate(sequences, self.answerer.template.pad_id).to(self.answerer.world.device)
        logprob, _ = self.answerer.module(LogprobStep(batch))
        ratios = sequence_sums((logprob - batch.reference_logprob).double(), batch.sequence_ids, len(sequences))
        return ratios.tolist()

"""On-policy data: the policy answers training questions itself, and its graded answers become the loop's examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.confidence.answering import Answerer
from calibtrain.config import PolicyGradientConfig, RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.loader import planned_steps, step_indices
from calibtrain.distributed import gather_lists, shard
from calibtrain.errors import UserError
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import ANSWER, Batch
from calibtrain.models.loss_model import LogprobStep, LossModel
from calibtrain.records import Record
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.rollout_credit import Credit, credit
from calibtrain.training.rollout_rewards import check_rewards
from calibtrain.training.samples import Sample, loaded_sample
from calibtrain.training.sampling import Sampling

logger = logging.getLogger(__name__)

ROUNDS_ALIKE = 3
"""Rounds without any difference in reward, before that is said."""


class Rollouts(Sequence[tuple[Encoded, ...]]):
    """Item i: the group of answers that the policy gave to question i in the present round, for the loop to train on.

    Which questions a round asks and what it draws are pure functions of (seed, step, ranks) and the weights; a round that
    spans several steps is kept in checkpoints, so that a resume continues bit for bit. `reference` is a frozen copy of the
    starting model for the KL; None switches LoRA's adapters off instead.
    """

    def __init__(
        self,
        config: RunConfig,
        answerer: Answerer,
        questions: Sequence[Record],
        plan: BatchPlan,
        reference: LossModel | None = None,
    ) -> None:
        objective = config.objective
        assert isinstance(objective, PolicyGradientConfig)
        check_rewards(config)
        if not all(map(answerer.template.task.gradable, questions)):
            raise UserError(f"objective.name: {objective.name} grades what it samples: training questions need answers")
        self.config, self.answerer, self.questions, self.plan = config, answerer, list(questions), plan
        self.sampling = Sampling(config, answerer, self.questions)
        self.total_steps = planned_steps(config.training, len(self.questions), plan.global_batch_size)
        self.reference = reference
        self.needs_reference = objective.needs.reference == "live"
        self.needs_values = objective.needs.module == "value head"
        self.off_policy = config.rollouts.steps_per_round > 1
        if config.rollouts.rewards_nothing:
            watch_of(answerer.module.objective).leave("advantages")  # all 0, as they should be
        self.samples: list[Sample] = []
        self.metrics: dict[str, float] = {}
        self._alike = 0  # rounds in a row without any difference in reward
        self._groups: dict[int, list[int]] = {}  # question -> its samples
        self._credit: list[Credit] = []

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Encoded, ...]:  # type: ignore[override]
        return tuple(self._encoded(self.samples[i]) for i in self._groups[index])

    def before_step(self, step: int) -> None:
        """Sample, grade and credit the answers of the coming steps where a round begins at `step` (from 0). Collective."""
        span = self.config.rollouts.steps_per_round
        if step % span:
            return
        model = self.answerer.module
        was_training, scale = model.training, model.policy.scale
        model.eval()
        model.policy.scale = 1.0  # the policy that is trained, not the one that is asked for its confidence
        try:
            mine = self.sampling(shard(self._asked(step), self.answerer.world), step)
            if self.config.rollouts.engine.overlap and step + span < self.total_steps:
                self.sampling.draw_ahead(shard(self._asked(step + span), self.answerer.world), step + span, step)
            mine = self._measured(mine)
        finally:
            model.train(was_training)
            model.policy.scale = scale
        self._take(gather_lists(mine))

    def _asked(self, step: int) -> list[int]:
        """Questions of the round that begins at `step`, over all ranks."""
        total, span = self.plan.global_batch_size, self.config.rollouts.steps_per_round
        return [i for k in range(span) for i in step_indices(step + k, total, len(self), self.config.seed)]

    def close(self) -> None:
        """End what the sampling engine has started. Local."""
        self.sampling.close()

    def fill(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The collated batch of the questions at `indices` with what its objective reads of each token."""
        chosen = [i for index in indices for i in self._groups[index]]
        samples = [self.samples[i] for i in chosen]

        def flat(parts: Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor([value for part in parts for value in part], dtype=torch.float32)

        return replace(
            batch,
            advantages=flat([self._credit[i].advantages for i in chosen]),
            old_logprob=flat([one.logprobs for one in samples]) if self.off_policy else None,
            reference_logprob=flat([one.reference for one in samples]) if self.needs_reference else None,
            old_values=flat([one.values for one in samples]) if self.needs_values else None,
            returns=flat([self._credit[i].returns for i in chosen]) if self.needs_values else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the present round, and of the next one where it is drawn ahead; nothing of a round of one step,
        whose successor draws anew.
        """
        samples = [asdict(one) for one in self.samples] if self.off_policy else []
        sampling = self.sampling.state_dict()
        return {"samples": samples, **({"sampling": sampling} if sampling else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the round of a checkpoint."""
        self.sampling.load_state_dict(state.get("sampling", {}))
        saved: list[dict[str, Any]] = state["samples"]
        if saved:
            self._take([loaded_sample(one) for one in saved])

    def _take(self, samples: list[Sample]) -> None:
        """Make these the present round. A question that is asked twice in it keeps the answers of its last turn."""
        size = self.config.rollouts.group_size
        groups = [i // size for i in range(len(samples))]
        self.samples = samples
        self._groups = {
            samples[start].question: list(range(start, start + size)) for start in range(0, len(samples), size)
        }
        self._credit, self.metrics = credit(samples, groups, self.config)
        self.metrics |= self.sampling.metrics
        self._alike = self._alike + 1 if self.metrics["alike"] == 1.0 else 0
        if self._alike == ROUNDS_ALIKE and self.answerer.world.is_main:
            logger.warning(
                "rollouts: in %d rounds in a row every answer earned what the others of its group did (correct %.2f, tokens "
                "%.1f), and nothing was learnt: look at what is graded as right, at evaluation.max_new_tokens and at "
                "rollouts.group_size",
                ROUNDS_ALIKE,
                self.metrics["correct"],
                self.metrics["tokens"],
            )

    def _measured(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probs and values that credit and later steps need, in as many passes on each rank."""
        if not (self.needs_reference or self.needs_values or self.off_policy):
            return samples
        size = self.plan.micro_batch_size * self.config.rollouts.group_size
        found: list[Sample] = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            batch = collate([self._encoded(one) for one in part], self.answerer.template.pad_id)
            batch = batch.to(self.answerer.world.device)
            lengths = [len(one.tokens) for one in part]
            logprobs, values = self.answerer.module(LogprobStep(batch))
            changes = {"logprobs": logprobs, "values": values if self.needs_values else None}
            if self.needs_reference:
                model = self.answerer.module if self.reference is None else self.reference
                changes["reference"] = model(LogprobStep(batch, base=self.reference is None))[0]
            rows: dict[str, list[Any]] = {
                name: [tuple(row.tolist()) for row in tensor.cpu().split(lengths)]
                for name, tensor in changes.items()
                if tensor is not None
            }
            found += [replace(one, **{name: row[i] for name, row in rows.items()}) for i, one in enumerate(part)]
        return found

    def _encoded(self, sample: Sample) -> Encoded:
        prompt = self.sampling.prompts[sample.question]
        # Who abstains claims nothing: there is no likelihood to score.
        correct = math.nan if sample.abstained else sample.correct
        length = len(sample.tokens)
        span = sample.answer_start, length if sample.answer_stop is None else sample.answer_stop
        answer = None if span == (0, length) else span
        return Encoded(
            (*prompt, *sample.tokens), len(prompt), ANSWER, sample.question, correct=correct, answer_span=answer
        )

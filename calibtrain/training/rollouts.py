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
from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.loader import planned_steps
from calibtrain.distributed import gather_lists, shard
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import ANSWER, Batch
from calibtrain.models.loss_model import LogprobStep, LossModel
from calibtrain.records import Record
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.reward_rounds import RewardRounds
from calibtrain.training.rollout_credit import Credit, credit, groups_alike, learned_from, mean_grade, paid
from calibtrain.training.rollout_rewards import check_graded, check_rewards
from calibtrain.training.rounds import Rounds
from calibtrain.training.samples import Sample, loaded_sample
from calibtrain.training.sampling import Sampling

logger = logging.getLogger(__name__)

ROUNDS_ALIKE = 3
"""Rounds without any difference in reward, before that is said."""


class Rollouts(Sequence[tuple[Encoded, ...]]):
    """Item k: the answers to the k-th question of the present round, for the loop to train on; `indices` says which, when.
    The length is that of the training questions, which epochs are counted in.

    Which questions a round asks and what it draws are pure functions of (seed, step) and the weights; a round that spans
    several steps is kept in checkpoints, so that a resume continues bit for bit. `reference` is a frozen copy of the
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
        check_rewards(config)
        check_graded(config, answerer.template.task, questions)
        self.config, self.answerer, self.questions, self.plan = config, answerer, list(questions), plan
        self.sampling = Sampling(config, answerer, self.questions)
        self.rewards = RewardRounds(config, answerer, self.questions)
        self.total_steps = planned_steps(config.training, len(self.questions), plan.global_batch_size, config.passes)
        self.reference = reference
        self.needs_reference = objective.needs.reference == "live"
        self.needs_values = objective.needs.credit == "values"
        rollouts = config.rollouts
        self.rounds = Rounds(
            len(self.questions), plan.global_batch_size, rollouts.steps_per_round, rollouts.epochs, config.seed
        )
        self.off_policy = self.rounds.length > 1
        if config.rollouts.rewards_nothing:
            watch_of(answerer.module.objective).leave("advantages")  # all 0, as they should be
        self.samples: list[Sample] = []
        self.metrics: dict[str, float] = {}
        self._told: dict[str, float] = {}  # of the round's sampling, which its samples alone do not say
        self._alike = 0  # rounds in a row without any difference in reward
        self._credit: list[Credit] = []

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Encoded, ...]:  # type: ignore[override]
        return tuple(self._encoded(self.samples[i]) for i in self._learned(index))

    def indices(self, step: int) -> list[int]:
        """The groups of the present round that a step learns from, over all ranks."""
        return self.rounds.groups(step)

    def before_step(self, step: int) -> None:
        """Sample, grade and credit the answers of the coming steps where a round begins at `step` (from 0). Collective."""
        if not self.rounds.begins(step):
            return
        model = self.answerer.module
        was_training, scale = model.training, model.policy.scale
        model.eval()
        model.policy.scale = 1.0  # the policy that is trained, not the one that is asked for its confidence
        self.samples, self._told = [], {}  # what ends the run in here leaves no round to go on with
        try:
            self.rewards.begin()
            samples, told = self._sampled(step)
            self._draw_ahead(step)
            if self._measures:
                mine, world = shard(samples, self.answerer.world), self.answerer.world
                samples = gather_lists(self._measured(mine, longest=-(-len(samples) // world.size)))
        finally:
            model.train(was_training)
            model.policy.scale = scale
        self._take(samples, told)

    def close(self) -> None:
        """End what the sampling engine has started. Local."""
        self.sampling.close()

    def fill(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The collated batch of the questions at `indices` with what its objective reads of each token."""
        chosen = [i for index in indices for i in self._learned(index)]
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
            importance=flat([self._credit[i].importance for i in chosen]) if self._corrects else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the present round, and of what is drawn ahead; nothing of a round of one step."""
        kept = [asdict(one) for one in self.samples] if self.off_policy else []
        more = {
            "told": self._told if kept else {},
            "rewards": self.rewards.state_dict(within_round=bool(kept)),
            "sampling": self.sampling.state_dict(),
        }
        return {"samples": kept} | {name: state for name, state in more.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the round of a checkpoint."""
        self.sampling.load_state_dict(state.get("sampling", {}))
        self.rewards.load_state_dict(state.get("rewards", {}))
        saved: list[dict[str, Any]] = state["samples"]
        if saved:
            self._take([loaded_sample(one) for one in saved], state.get("told", {}))

    @property
    def _corrects(self) -> bool:
        return self.config.rollouts.correction != "none"

    @property
    def _measures(self) -> bool:
        """Whether credit or a later step needs more of the samples than their sampler gave."""
        return self.needs_reference or self.needs_values or self.off_policy or self._corrects

    def _learned(self, group: int) -> list[int]:
        """The samples of a group that are part of batches."""
        size = self.config.rollouts.group_size
        return [i for i in range(group * size, (group + 1) * size) if self._credit[i].learned]

    def _sampled(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """Graded samples of every group of the round that begins at `step`, on every rank, and what to tell of it.

        With dynamic sampling other questions are asked in the place of groups that are all alike; those with a difference
        stand where the others stood. Collective.
        """
        size, limit = self.config.rollouts.group_size, self.config.rollouts.dynamic_sampling
        asked = self.rounds.asked(step)
        samples = self._ask(asked, step, 0)
        found = [samples[start : start + size] for start in range(0, len(samples), size)]
        if not limit:
            return samples, {}
        flat, wanting = self._alike_among(found), len(found)
        empty = [place for place, alike in enumerate(flat) if alike]
        every, drawn = [*found], 0
        for attempt in range(1, limit + 1):
            if not empty:
                break
            others = self.rounds.others(step, attempt, len(empty), set(asked))
            asked += others
            samples, drawn = self._ask(others, step, attempt), attempt
            more = [samples[start : start + size] for start in range(0, len(samples), size)]
            every += more
            good = [group for group, alike in zip(more, self._alike_among(more), strict=True) if not alike]
            for place, group in zip(empty, good, strict=False):
                found[place] = group
            empty = empty[len(good) :]
        told = {
            "asked": float(len(every)),
            "thrown_away": float(len(every) - wanting),
            "without_signal": len(empty) / wanting,
            "asked_anew": float(drawn),
            "correct_of_all": mean_grade([one for group in every for one in group]),
        }
        return [one for group in found for one in group], told

    def _ask(self, asked: Sequence[int], step: int, attempt: int) -> list[Sample]:
        """Graded samples of these questions in their order, on every rank. Collective.

        All ranks make as many passes: where the questions do not go round, the last one is asked again, and not looked at.
        """
        mine, streams = self._shared(asked, attempt)
        samples = gather_lists(self.rewards.measured(self.sampling(mine, step, streams)))
        return samples[: len(asked) * self.config.rollouts.group_size]

    def _shared(self, asked: Sequence[int], attempt: int) -> tuple[list[int], list[str]]:
        """This rank's share of questions, of as many as on any other, and the names of what is drawn for them."""
        world, places = self.answerer.world, list(enumerate(asked))
        mine = shard(places + places[-1:] * (-len(places) % world.size), world)
        return [question for _, question in mine], [f"{attempt}.{place}" for place, _ in mine]

    def _draw_ahead(self, step: int) -> None:
        """Begin to draw the next round's first answers, where that is asked for and there is one. Collective."""
        following = step + self.rounds.length
        if self.config.rollouts.engine.overlap and following < self.total_steps:
            self.sampling.draw_ahead(*self._shared(self.rounds.asked(following), 0), following, version=step)

    def _alike_among(self, groups: Sequence[Sequence[Sample]]) -> list[bool]:
        ids = [number for number, group in enumerate(groups) for _ in group]
        flat = [one for group in groups for one in group]
        rewards = paid(flat, ids, self.config, self.rewards.memory)
        return groups_alike(rewards, torch.tensor(ids, dtype=torch.int64), learned_from(flat, self.config)).tolist()

    def _take(self, samples: list[Sample], told: dict[str, float]) -> None:
        """Make these the present round."""
        size = self.config.rollouts.group_size
        groups = [i // size for i in range(len(samples))]
        self.samples, self._told = samples, told
        self._credit, means = credit(samples, groups, self.config, self.rewards.memory)
        self.metrics = means | told | self.rewards.end(samples, torch.tensor(groups)) | self.sampling.metrics
        self._alike = self._alike + 1 if self.metrics["alike"] == 1.0 else 0
        if self._alike == ROUNDS_ALIKE and self.answerer.world.is_main:
            logger.warning(
                "rollouts: in %d rounds in a row every answer earned what the others of its group did (correct %s, tokens "
                "%.1f, cut %.2f), and nothing was learnt: look at %s, at evaluation.max_new_tokens and at "
                "rollouts.group_size",
                ROUNDS_ALIKE,
                "unknown" if math.isnan(self.metrics["correct"]) else f"{self.metrics['correct']:.2f}",
                self.metrics["tokens"],
                self.metrics["truncated"],
                "what is graded as right" if self.config.rollouts.needs_grades else "what rollouts.sources give",
            )

    def _measured(self, samples: list[Sample], longest: int) -> list[Sample]:
        """The samples with the log-probs and values that credit and later steps need.

        `longest`: of any rank, which all make as many passes as; some of them may be of nothing.
        """
        size = self.plan.micro_batch_size * self.config.rollouts.group_size
        found: list[Sample] = []
        for start in range(0, longest, size):
            part = samples[start : start + size]
            batch = collate([self._encoded(one) for one in part], self.answerer.template.pad_id)
            batch = batch.to(self.answerer.world.device)
            lengths = [len(one.tokens) for one in part]
            logprobs, values = self.answerer.module(LogprobStep(batch, after=self.needs_values))
            changes = {"logprobs": logprobs, "values": None if values is None else values[: sum(lengths)]}
            if self.needs_reference:
                model = self.answerer.module if self.reference is None else self.reference
                changes["reference"] = model(LogprobStep(batch, base=self.reference is None))[0]
            rows: dict[str, list[Any]] = {
                name: [tuple(row.tolist()) for row in tensor.cpu().split(lengths)]
                for name, tensor in changes.items()
                if tensor is not None
            }
            part = [replace(one, **{name: row[i] for name, row in rows.items()}) for i, one in enumerate(part)]
            if values is not None:
                after = values[sum(lengths) :].tolist()
                part = [replace(one, last_value=value) for one, value in zip(part, after, strict=True)]
            found += part
        return found

    def _encoded(self, sample: Sample) -> Encoded:
        prompt = self.sampling.prompts[sample.question]
        # Who abstains claims nothing: there is no likelihood to score. Nor is there of an answer that the cut broke off, but
        # where the cut is the end: then what stands is the whole answer, and just so likely.
        broken = not sample.finished and sample.answer_stop is None and self.config.truncated != "graded"
        correct = math.nan if sample.abstained or broken else sample.correct
        length = len(sample.tokens)
        span = sample.answer_start, length if sample.answer_stop is None else sample.answer_stop
        answer = None if span == (0, length) else span
        return Encoded(
            (*prompt, *sample.tokens), len(prompt), ANSWER, sample.question, correct=correct, answer_span=answer
        )

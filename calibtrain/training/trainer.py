"""The training loop: one optimiser step on one screen, the same on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answering import Answerer, answer_metrics
from calibtrain.confidence.head import FittedHead
from calibtrain.config import RunConfig
from calibtrain.data.collate import collate, row_tokens
from calibtrain.data.encode import Encoded
from calibtrain.data.loader import epoch_at, rank_micro_batches, step_indices
from calibtrain.distributed import World, gather_lists, on_main
from calibtrain.errors import EngineFailure, Preempted, UserError
from calibtrain.hooks.base import HookList
from calibtrain.hooks.records import CheckpointRecord, EvaluationRecord, MicroBatchRecord, SpectraRecord, StepRecord
from calibtrain.losses.terms import ANSWER, QUERY, Batch, divisor, global_counts
from calibtrain.models.loss_model import StepStatistics, TrainStep
from calibtrain.records import Record
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.averaging import WeightAverage
from calibtrain.training.best import is_over, judged
from calibtrain.training.changing_examples import ChangingExamples
from calibtrain.training.checkpoint import (
    Progress,
    Writing,
    begin_checkpoint,
    checkpoint_of,
    end_checkpoint,
    load_weights,
)
from calibtrain.training.checkpoint_files import damage_of
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.engine import Engine
from calibtrain.training.head_fit import HeadFit
from calibtrain.training.held_out import HeldOut
from calibtrain.training.host_memory import RELEASE_EVERY, release_freed_memory
from calibtrain.training.preemption import StopRequests
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.spectra import Spectra
from calibtrain.training.throughput import Meter, Trace
from calibtrain.training.weight_penalty import WeightPenalties

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Everything a run's loop needs; `examples` are the training records as sequences, one or more each."""

    config: RunConfig
    engine: Engine
    examples: Sequence[tuple[Encoded, ...]]
    origins: Sequence[str]  # of the records, for messages
    plan: BatchPlan
    total_steps: int
    world: World
    answerer: Answerer
    hooks: HookList
    output_dir: Path
    data_hash: str
    stream: AnswerStream | None = None
    average: WeightAverage | None = None
    weight_penalties: WeightPenalties | None = None
    spectra: Spectra | None = None
    packing_tokens: int | None = None
    shared_prefix: bool = False
    evaluation_questions: Sequence[Record] = ()
    held_out: HeldOut | None = None
    rollouts: ChangingExamples | None = None  # then these are the examples
    head_fit: HeadFit | None = None  # of a confidence head
    meter: Meter = field(default_factory=lambda: Meter(torch.device("cpu")))
    writings: list[Writing] = field(default_factory=list)  # the checkpoint that is written while training goes on

    def fit(self, progress: Progress, stop: StopRequests | None = None) -> Progress:
        """Train from `progress` to the last step, or to where it gets no better.

        Raises UserError after too many steps with non-finite gradients, and Preempted, behind a checkpoint, where the run
        was asked to `stop`.
        """
        with closing(Trace(self.config.training.profile_steps, self.output_dir / "profile", self.world.rank)) as trace:
            return self._fit(progress, stop, trace)

    def _fit(self, progress: Progress, stop: StopRequests | None, trace: Trace) -> Progress:
        training, first = self.config.training, progress.step
        self.engine.module.train()
        for step in range(progress.step, self.total_steps):
            if training.best is not None and is_over(progress.best, training.best):
                logger.info("training ends at step %d: no better evaluation for %d", step, training.best.patience)
                if step > first and step % training.log_every:
                    self.hooks.reduce_and_log(step, self.total_steps)
                break
            started = time.perf_counter()
            if stop is not None:
                stop.begin()
            if self.stream is not None:
                self.stream.before_step(step)
            if self.rollouts is not None:
                self._prepare_examples(self.rollouts, progress)
            trace.before_step()
            window = self._window(step)
            learning_rate = self.engine.set_learning_rate(step, self.total_steps, training)
            outputs = []
            for micro_batch in window:
                loss, output = self.engine.deepspeed(micro_batch)
                self.engine.backward(loss, last=micro_batch is window[-1])
                if self._tells:
                    record = MicroBatchRecord.of(output.stats, output.batch, output.terms, output.measures)
                    self.hooks.dispatch("on_micro_batch", record)
                outputs.append(output)
            if self.weight_penalties is not None:
                self.weight_penalties.arm(step)
            skipped, grad_norm = self.engine.step()
            self.engine.module.after_step()
            progress = replace(
                progress, step=step + 1, skipped_in_a_row=progress.skipped_in_a_row + 1 if skipped else 0
            )
            if skipped:
                self._report_skip(progress, outputs)
            self.hooks.dispatch(
                "on_step",
                StepRecord(
                    step=progress.step,
                    total_steps=self.total_steps,
                    epoch=epoch_at(progress.step, self.plan.global_batch_size, len(self.examples), self.config.passes),
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    skipped=skipped,
                    seconds=time.perf_counter() - started,
                    tokens=self.meter.tokens,
                    logit_scale=None if self.stream is None else self.engine.module.policy.scale,
                    weight_penalties={} if self.weight_penalties is None else self.weight_penalties.values(),
                    rollouts={} if self.rollouts is None else self.rollouts.metrics,
                    cost=self.meter.cost(),
                ),
            )
            trace.after_step()
            if self.average is not None:
                self.average.after_step(progress.step)
            progress = self._after_step(progress)
            if stop is not None and stop.made() and progress.step < self.total_steps:
                self._end_early(progress)
        self._end_writing()
        return progress

    def take_best(self, progress: Progress) -> None:
        """Put the weights of the best evaluation in place of the last ones, where they are asked for. Collective."""
        wanted, best = self.config.training.best, progress.best
        if wanted is None:
            return
        if best is None:
            logger.warning("training.best: %s was no number at any evaluation; the last weights stay", wanted.metric)
            return
        if best.step != progress.step:
            path = checkpoint_of(self.output_dir / "checkpoints", best.step)
            if (damage := on_main(lambda: damage_of(path) if path.is_dir() else "it is gone")) is not None:
                logger.warning("training.best: %s is damaged (%s); the last weights are exported", path, damage)
                return
            load_weights(path, self.engine)
        logger.info(
            "the weights of step %d are kept: %s %.6g, the %s", best.step, wanted.metric, best.value, wanted.goal
        )

    def finish(self, step: int) -> FittedHead | None:
        """Put the averaged weights in place, solve for what fits them (logit scale, confidence head), measure their loss.

        Returns the head, on rank 0, where there is one. Collective.
        """
        if self.average is not None:
            self.average.apply()
        answers = None if self.stream is None else self.stream.round(step)
        if answers is not None:
            self._report_answers(step, answers)
        head = None
        if self.head_fit is not None:
            head, metrics = self.head_fit.solve()
            if metrics:
                self.hooks.dispatch("on_evaluation", EvaluationRecord(step, "calibration", metrics, []))
        self.evaluate_loss(step)
        return head

    def evaluate_loss(self, step: int) -> dict[str, float]:
        """Measure the loss on held-out records, if there are any, and tell the hooks. What was measured. Collective."""
        if self.held_out is None:
            return {}
        metrics = self.held_out.measure(self.engine.module)
        self.hooks.dispatch("on_evaluation", EvaluationRecord(step, "validation", metrics, []))
        return metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """Answer calibration questions and tell the hooks. What was measured. Collective."""
        questions = self.evaluation_questions[: self.config.training.evaluate_questions]
        return self._report_answers(step, self.answerer.answers(questions))

    def _report_answers(self, step: int, answers: Sequence[Answer]) -> dict[str, float]:
        named = {f"calib/calibration/likelihood/{key}": value for key, value in answer_metrics(answers).items()}
        record = EvaluationRecord(step, "calibration", named, answers if self.world.is_main else [])
        self.hooks.dispatch("on_evaluation", record)
        return named

    def _after_step(self, progress: Progress) -> Progress:
        """Tell, evaluate and keep what is due. The progress with the best evaluation so far. Collective."""
        training, step = self.config.training, progress.step
        last = step == self.total_steps
        self._end_writing(wait=False)
        if self.world.device.type == "cpu" and (step % RELEASE_EVERY == 0 or last):
            release_freed_memory()
        if step % training.log_every == 0 or last:
            self.hooks.reduce_and_log(step, self.total_steps)
        if self.spectra is not None and self.spectra.is_due(step, self.total_steps):
            self.hooks.dispatch("on_spectra", SpectraRecord(step, self.spectra.read()))
        if self.stream is not None and not last and self.stream.is_due(step):
            self._report_answers(step, self.stream.round(step) or [])
        measured: dict[str, float] = {}
        if self.evaluation_questions and training.evaluate_every and (step % training.evaluate_every == 0 or last):
            measured |= self.evaluate(step)
        # The last weights are measured when the run is finished, unless that is what says which ones are.
        due = (
            training.best is not None
            if last
            else training.evaluate_loss_every and step % training.evaluate_loss_every == 0
        )
        if due:
            measured |= self.evaluate_loss(step)
        return self._keep(progress, measured)

    def _keep(self, progress: Progress, measured: Mapping[str, float]) -> Progress:
        """Write the checkpoint that is due, or worth it by what was measured. The progress with what is best. Collective."""
        step, wanted = progress.step, self.config.training.best
        before = progress
        if wanted is not None:
            progress = replace(progress, best=judged(progress.best, wanted, measured, step))
        better = progress.best is not None and progress.best.step == step < self.total_steps
        # Whether the best one could be kept is known before the next is judged.
        wait = better or step == self.total_steps or not self.config.training.checkpoint_in_background
        if (better or self._checkpoint_is_due(step)) and not self._save(progress, wait=wait) and better:
            return before  # what was not kept cannot be gone back to
        return progress

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.config.training.checkpoint_every
        return every is not None and (step % every == 0 or step == self.total_steps)

    def _save(self, progress: Progress, *, wait: bool = True) -> bool:
        """Write a checkpoint, or begin to where there is no `wait`. False where it could not be written. Collective."""
        self._end_writing()
        writing = begin_checkpoint(
            self.output_dir / "checkpoints",
            progress,
            self.engine,
            self.stream,
            self.average,
            self.hooks,
            self.config,
            self.data_hash,
            self.world,
            self.rollouts,
            background=not wait,
        )
        self.writings.append(writing)
        return self._end_writing(wait=wait)

    def _end_writing(self, *, wait: bool = True) -> bool:
        """Name the checkpoint that has been written and tell the hooks. False where it could not be. Collective."""
        if not self.writings:
            return True
        (writing,) = self.writings
        written, path = end_checkpoint(writing, self.world, wait=wait)
        if not written:
            return True
        self.writings.clear()
        if path is not None:
            self.hooks.dispatch("on_checkpoint", CheckpointRecord(writing.step, path))
        return path is not None

    def _prepare_examples(self, examples: ChangingExamples, progress: Progress) -> None:
        """Make the examples of the coming step; where their engine is lost, end with what was learnt. Collective."""
        try:
            examples.before_step(progress.step)
        except EngineFailure as error:
            if not progress.step:
                raise
            raise EngineFailure(f"{error}; training stopped after {self._kept(progress)}") from None

    def _end_early(self, progress: Progress) -> None:
        """Keep what the run has come to and raise Preempted. Collective."""
        raise Preempted(progress.step, f"stopped as asked (SIGTERM) after {self._kept(progress)}")

    def _kept(self, progress: Progress) -> str:
        """Write a checkpoint, where there is none of this step; which step it is and how to go on, in words. Collective."""
        self._end_writing()
        directory = checkpoint_of(self.output_dir / "checkpoints", progress.step)
        kept = directory.is_dir() if self._checkpoint_is_due(progress.step) else self._save(progress)
        told = f"checkpoint: {directory}" if kept else "its checkpoint could not be written, the one before stays"
        again = "The same command with training.resume=auto goes on from there"
        return f"step {progress.step} of {self.total_steps}; {told}. {again}"

    def _window(self, step: int) -> list[TrainStep]:
        """Micro-batches of this rank in one optimiser step, with every term's count over all ranks and micro-batches."""
        self.meter.begin()
        indices = self._indices(step)
        lengths = [row_tokens(self.examples[index], self.packing_tokens, self.shared_prefix) for index in indices]
        group = self.world.groups_of(self.plan.sequence_parallel_size)
        mine = rank_micro_batches(
            indices,
            lengths,
            group.size,
            self.plan.micro_batch_size,
            packed=self.packing_tokens is not None,
        )[group.rank]
        batches = [self._micro_batch(step, number, len(mine), chosen) for number, chosen in enumerate(mine)]
        self.meter.batches_made()
        totals = global_counts(self.engine.module, [one.batch for one in batches])  # type: ignore[arg-type]
        self.meter.others_came()
        # DeepSpeed averages gradients over ranks, so the global mean is the sum over ranks times their number. Ranks that
        # share their rows have counted each of them, and each has its part of the gradient.
        ranks = self.world.size * self.plan.sequence_parallel_size
        divisors = {name: (divisor(total) / ranks).float() for name, total in totals.items()}
        return [replace(one, divisors=divisors) for one in batches]

    @property
    def _tells(self) -> bool:
        """Whether this rank speaks for those that have the same micro-batches, so that none is counted twice."""
        return self.world.rank % self.plan.sequence_parallel_size == 0

    def _indices(self, step: int) -> list[int]:
        """Which of the examples a step learns from, over all ranks."""
        if isinstance(self.rollouts, Rollouts):  # a round is passed over in an order of its own
            return self.rollouts.indices(step)
        return step_indices(step, self.plan.global_batch_size, len(self.examples), self.config.seed)

    def _micro_batch(self, step: int, number: int, count: int, indices: Sequence[int]) -> TrainStep:
        sequences = [sequence for index in indices for sequence in self.examples[index]]
        if self.stream is not None and self.stream.in_loss:
            sequences += self.stream.share(step, number, count, self.world.groups_of(self.plan.sequence_parallel_size))
        batch = collate(
            sequences,
            self.answerer.template.pad_id,
            self.config.nll_scope,
            self.packing_tokens,
            shared_prefix=self.shared_prefix,
        )
        if self.rollouts is not None:
            batch = self.rollouts.fill(batch, indices)
        if self._tells:
            self.meter.see(batch)
        return TrainStep(batch.to(self.world.device), {})

    def _report_skip(self, progress: Progress, outputs: Sequence[StepStatistics]) -> None:
        """Name the records whose log-probs were not finite; end a run that no longer learns. Collective."""
        own = {self._origin(output.batch, i) for output in outputs for i in _non_finite(output)}
        named = gather_lists(sorted(own) if self._tells else [])
        cause = f"records {', '.join(named[:8])}" if named else "every log-prob was finite, a gradient overflowed"
        if self.world.is_main:
            logger.warning("step %d skipped: gradients were not finite (%s)", progress.step, cause)
        if progress.skipped_in_a_row >= self.config.training.max_skipped_steps:
            self._end_writing()
            raise UserError(
                f"training stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row had non-finite "
                f"gradients ({cause}); lower training.learning_rate, or look at these records"
            )

    def _origin(self, batch: Batch, sequence: int) -> str:
        index = int(batch.record_ids[sequence])
        if self.stream is not None and self.stream.in_loss and int(batch.roles[sequence]) in (ANSWER, QUERY):
            question = self.stream.questions[index]
            return question.origin or question.question
        return self.origins[index]


def _non_finite(output: StepStatistics) -> list[int]:
    bad = ~output.stats.logprob.isfinite()
    return output.batch.sequence_ids[bad].unique().tolist()

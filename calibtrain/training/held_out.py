"""The loss on records that are never trained on: exact over ranks, with as many forward passes on each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, encode_records
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.losses.terms import CHOSEN, Batch
from calibtrain.models.loss_model import LogprobStep, LossModel, TrainStep
from calibtrain.records import Record

logger = logging.getLogger(__name__)

NLL = ""
"""Stands for the NLL among the names of loss terms."""


@dataclass(frozen=True)
class HeldOut:
    """The validation split as sequences, and how their batches are laid out."""

    config: RunConfig
    examples: Sequence[tuple[Encoded, ...]]
    pad_id: int
    world: World
    packing_tokens: int | None = None
    shared_prefix: bool = False

    @torch.no_grad()
    def measure(self, module: LossModel) -> dict[str, float]:
        """`eval/loss`, NLL in nats per token of the answers to learn, with their end tokens, without dropout; and
        `eval/loss/TERM`, the mean of each term of the loss, where the records are all that it reads. Collective.
        """
        names = self._names(module)
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.world.device)
        was_training = module.training
        module.eval()
        try:
            for examples in self._mine():
                batch = self._batch(examples).to(self.world.device)
                found = _terms(module, batch) if len(names) > 1 else _nll(module, batch)
                rows = [torch.stack([one.double().to(sums) for one in found[name]]) for name in names]
                sums += torch.stack(rows)
        finally:
            module.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = zip(self.keys(module), sums.tolist(), strict=True)
        return {key: total / count for key, (total, count) in means if count}

    def keys(self, module: LossModel) -> list[str]:
        """Names of what is measured."""
        return [f"eval/loss/{name}" if name else "eval/loss" for name in self._names(module)]

    def _names(self, module: LossModel) -> list[str]:
        return [NLL, *(sorted(module.counts(self._batch([]))) if self._has_terms(module) else ())]

    def _mine(self) -> list[list[tuple[Encoded, ...]]]:
        """Micro-batches of this rank, of like length; where another rank has one more, an empty one stands for it."""
        training = self.config.training
        size, group = training.micro_batch_size, self.world.groups_of(training.sequence_parallel_size)
        ordered = sorted(self.examples, key=lambda group: -max(len(one.ids) for one in group))
        cut = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        mine = cut[group.rank :: group.size]
        return [*mine, *([[]] * (-(-len(cut) // group.size) - len(mine)))]

    def _batch(self, examples: Sequence[tuple[Encoded, ...]]) -> Batch:
        sequences = [sequence for group in examples for sequence in group]
        return collate(
            sequences, self.pad_id, self.config.nll_scope, self.packing_tokens, shared_prefix=self.shared_prefix
        )

    def _has_terms(self, module: LossModel) -> bool:
        """Whether the loss reads nothing but these sequences, and keeps nothing of what it reads."""
        data = self.config.objective.needs.data
        fits = data == "records" or (data == "pairs" and all(len(group) == 2 for group in self.examples))
        return fits and not any(hasattr(term, "after_step") for term in (module.objective, *module.penalties))


def encode_held_out(records: Sequence[Record], config: RunConfig, template: Template) -> list[tuple[Encoded, ...]]:
    """The records with an answer to learn as sequences: pairs, where pairs are learned from and every record is one."""
    pairs = config.trains_on_pairs and all(record.rejected is not None for record in records)
    drops = DropReport()
    answered = [record for record in records if record.chosen is not None]
    examples = encode_records(
        answered, template, config.data.max_length, pairs, drops, every_turn=config.data.every_turn
    )
    for line in drops.lines():
        logger.warning("data: validation: %s", line)
    return examples


def _terms(module: LossModel, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
    one = torch.ones((), device=batch.targets.device)
    _, output = module(TrainStep(batch, dict.fromkeys(module.counts(batch), one)))
    # A reward model has no log-probs: none of its batch's tokens is a completion then.
    found = {name: (term.total, term.count) for name, term in output.terms.items()}
    return {**found, NLL: _chosen_nll(output.stats.logprob, output.batch)}


def _nll(module: LossModel, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
    logprob, _ = module(LogprobStep(batch))
    return {NLL: _chosen_nll(logprob, batch)}


def _chosen_nll(logprob: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    counted = batch.is_completion & (batch.roles == CHOSEN)[batch.sequence_ids]
    return -logprob.double()[counted].sum(), counted.sum()

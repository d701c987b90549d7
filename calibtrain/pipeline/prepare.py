"""Records of every split, the same for each job of a run: training, evaluation, calibration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibtrain.config import RunConfig
from calibtrain.data.calibration_set import Composition, composition_distance
from calibtrain.data.drops import DropReport
from calibtrain.data.pairs import add_rejected, with_confidence_statements
from calibtrain.data.sources import load_records
from calibtrain.data.splits import split_records, unique_records
from calibtrain.data.strata import check_named
from calibtrain.data.summary import data_hash
from calibtrain.data.templates import Template
from calibtrain.data.unpaired import unpair
from calibtrain.distributed import on_main
from calibtrain.errors import UserError
from calibtrain.models.loading import cache_directory
from calibtrain.records import Record
from calibtrain.tasks.kinds import task_of

logger = logging.getLogger(__name__)

SAMPLES_PER_QUESTION = 3
"""Draws of the starting model from which the first wrong one becomes the rejected answer."""

Sampler = Callable[[Sequence[Record], Sequence[Record]], list[list[str]]]
"""(records, shots) -> texts of SAMPLES_PER_QUESTION answers each."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run."""

    splits: dict[str, list[Record]]
    shots: list[Record]  # examples for a model that has not learned the format
    composition: Composition | None  # of the calibration set against its source
    drops: DropReport
    read: int  # rows of the source of training records
    graded: int | None = None  # rows of the source of graded questions, where it is another

    @property
    def available(self) -> dict[str, int]:
        """How many records each split could hold."""
        return {name: len(records) + self.drops.unused.get(name, 0) for name, records in self.splits.items()}

    def lines(self) -> list[str]:
        """How many of how many records are used, a line a split."""
        sources = f"{self.read} rows read" + ("" if self.graded is None else f", and {self.graded} of data.questions")
        return [sources] + [
            f"{name}: {len(self.splits[name])} of the {count} records of this split"
            for name, count in self.available.items()
        ]

    @property
    def data_hash(self) -> str:
        """SHA-256 over every split's records."""
        return data_hash([record for name in sorted(self.splits) for record in self.splits[name]])


def prepare(config: RunConfig) -> Prepared:
    """Load and split the data. Raises UserError for what the user must mend, before any model is loaded."""
    drops = DropReport()
    unpaired = config.trains_unpaired
    records = load_records(config.data.source, config.seed, labelled=unpaired)
    if not records:
        raise UserError("data.source: the data set is empty")
    task = task_of(config.task)
    # A text that is learned as it stands asks nothing.
    records = [task.asked(record) if record.prompt else record for record in records]
    questions = None if config.data.questions is None else load_records(config.data.questions, config.seed)
    questions = None if questions is None else [task.asked(record) for record in questions]
    graded = records if questions is None else questions
    strata = {"calibration.domain": config.calibration.domain, "abstention.groups": config.abstention.groups}
    check_named([record for record in graded if task.gradable(record)], strata)
    splits = split_records(
        records, config.data.splits, config.seed, questions, drops, undesirable=unpaired, gradable=task.gradable
    )
    if config.objective.needs.answers_itself:
        # The model answers each question itself: what else its rows say is not learned from.
        splits["train"] = unique_records(splits["train"], drops)
    _check_weights(config, splits["train"])
    answered = [
        one for one in splits["train"] if one.chosen is not None and one.prompt and not (one.tools or one.calls)
    ]
    shots = unique_records(answered, DropReport())[: config.data.few_shot_raw]
    composition = None
    if splits["calibration"]:
        composition = composition_distance(splits["calibration"], graded, config.seed)
    return Prepared(splits, shots, composition, drops, len(records), None if questions is None else len(questions))


def _check_weights(config: RunConfig, train: Sequence[Record]) -> None:
    """Raise UserError where records have weights that the objective would pass over."""
    weighed = next((record for record in train if record.weight != 1.0), None)
    if weighed is not None and not config.objective.needs.weighs:
        raise UserError(
            f"{weighed.origin or weighed.question}: weight {weighed.weight:g}, and objective.name: {config.objective.name} "
            "does not weigh its records (sft does); leave weight out of the source's columns"
        )


def needs_rejected(config: RunConfig, prepared: Prepared) -> bool:
    """Whether preferences are trained on and the data holds graded answers but no rejected ones.

    Unpaired answers without any rejected one may all have been labelled as desirable, unless it is graded questions that
    they answer.
    """
    train, needs = prepared.splits["train"], config.objective.needs
    if not needs.preferences or any(record.rejected is not None for record in train):
        return False
    return needs.data == "pairs" or all(map(task_of(config.task).gradable, train))


def learned_records(config: RunConfig, records: Sequence[Record], drops: DropReport) -> list[Record]:
    """The training records, whose rejected answers have been found, as the objective learns from them."""
    needs = config.objective.needs
    if needs.statements != "none":
        return with_confidence_statements(records, keep=needs.statements == "added")
    return unpair(records, drops) if config.trains_unpaired else list(records)


def check_rejected(config: RunConfig, prepared: Prepared) -> None:
    """Raise UserError unless a rejected answer can be found for every training record."""
    task = task_of(config.task)
    if any(not task.gradable(record) and not record.chosen for record in prepared.splits["train"]):
        raise UserError(
            "training on preferences: training records need a rejected answer, or accepted answers to find one by"
        )


def add_own_wrong_answers(config: RunConfig, prepared: Prepared, template: Template, sample: Sampler) -> None:
    """Give every training record a rejected answer that the starting model itself produced; cached by content.

    Collective, as `sample` may be: rank 0 alone looks into the cache, which on another machine may be another one.
    """
    check_rejected(config, prepared)
    train = prepared.splits["train"]
    parts: list[object] = [
        config.model.source,
        config.model.revision,
        template.hash,
        data_hash(train),
        data_hash(prepared.shots),
    ]
    parts += [config.evaluation.max_new_tokens, SAMPLES_PER_QUESTION, config.seed, "without thinking"]
    path = cache_directory() / "samples" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.json"
    samples = on_main(lambda: _read(path, len(train)))
    if samples is None:
        logger.info("sampling the starting model's own wrong answers to %d training questions", len(train))
        samples = found = sample(train, prepared.shots)
        on_main(lambda: _write(path, found))
    pairs, fallbacks = add_rejected(train, samples, template.task)
    logger.info("rejected answers: %d the model's own, %d of another question", len(pairs) - fallbacks, fallbacks)
    prepared.splits["train"] = pairs


def _read(path: Path, count: int) -> list[list[str]] | None:
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return samples if isinstance(samples, list) and len(samples) == count else None


def _write(path: Path, samples: list[list[str]]) -> None:
    """Keep the answers for the next run. Without room for them this one goes on: they were dear."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(samples), encoding="utf-8")
        os.replace(partial, path)  # atomic: other runs may write the same
    except OSError as error:
        logger.warning("the sampled answers could not be kept for later runs in %s: %s", path, error)

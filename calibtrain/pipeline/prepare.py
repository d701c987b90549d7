"""Records of every split, the same for each job of a run: training, evaluation, calibration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from calibtrain.config import FileSource, MixtureSource, RunConfig
from calibtrain.config_data import DataConfig, Example, Source
from calibtrain.data.calibration_set import Composition, composition_distance
from calibtrain.data.drops import DropReport, check_share
from calibtrain.data.mixtures import STRATUM, drawn
from calibtrain.data.pairs import add_rejected, with_confidence_statements
from calibtrain.data.prompts import prompts_of
from calibtrain.data.sources import load_records
from calibtrain.data.splits import EVALUATION_SPLITS, split_of, split_records
from calibtrain.data.stored import GRADABLE, REJECTED, Made, StoredRecords, stored_records
from calibtrain.data.stored_splits import split_stored
from calibtrain.data.strata import check_named
from calibtrain.data.summary import data_hash
from calibtrain.data.templates import Template
from calibtrain.data.unpaired import unpair
from calibtrain.distributed import on_main
from calibtrain.errors import UserError
from calibtrain.models.loading import cache_directory
from calibtrain.pipeline.options import check_options
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of
from calibtrain.tasks.task import Task

logger = logging.getLogger(__name__)

SAMPLES_PER_QUESTION = 3
"""Draws of the starting model from which the first wrong one becomes the rejected answer."""

Sampler = Callable[[Sequence[Record], Sequence[Record]], list[list[str]]]
"""(records, shots) -> texts of SAMPLES_PER_QUESTION answers each."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run."""

    splits: dict[str, Sequence[Record]]
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
        return (
            [sources]
            + [
                f"{name}: {len(self.splits[name])} of the {count} records of this split"
                for name, count in self.available.items()
                if count or name != "validation"
            ]
            + self.drops.notes
        )

    @property
    def data_hash(self) -> str:
        """SHA-256 over every split's records."""
        stored = [one.content_hash for one in self.splits.values() if isinstance(one, StoredRecords)]
        held = {name: some for name, some in self.splits.items() if not isinstance(some, StoredRecords)}
        found = data_hash([record for name in sorted(held) for record in held[name]])
        return hashlib.sha256(" ".join([found, *stored]).encode()).hexdigest() if stored else found


def prepare(config: RunConfig) -> Prepared:
    """Load and split the data. Raises UserError for what the user must mend, before any model is loaded."""
    if config.data.streams:
        return _prepare_stored(config)
    data, drops, task = config.data, DropReport(strict=config.data.strict), task_of(config.task)
    unpaired, once = config.trains_unpaired, config.objective.needs.answers_itself
    apart = data.questions is not None
    bare = config.trains_on_rollouts and not config.rollouts.needs_grades
    records, read = _read_source(config, data.source, task, drops, labelled=unpaired, bare=bare, only_learned=apart)
    questions, asked = None, None
    if data.questions is not None:
        questions, asked = _read_source(config, data.questions, task, drops)
        questions = _not_shown(data, questions, drops)
    records = _not_shown(data, records, drops)
    mixture, asked_mixture = (one if isinstance(one, MixtureSource) else None for one in (data.source, data.questions))
    graded = records if questions is None else questions
    strata = {"calibration.domain": config.calibration.domain, "abstention.groups": config.abstention.groups}
    check_named([record for record in graded if task.gradable(record)], strata)
    splits: dict[str, Sequence[Record]] = {}
    splits |= split_records(
        records,
        data.splits,
        config.seed,
        questions,
        drops,
        undesirable=unpaired,
        gradable=task.gradable,
        mixture=mixture,
        asked_mixture=asked_mixture,
        examples=data.few_shot,
        # Where the model answers each question itself, what else its rows say is not learned from.
        once=once,
        bare=bare,
        spare=config.confidence_head is not None,
    )
    check_options(config, task, splits)
    _check_weights(config, splits["train"])
    shots = _add_shown(config, splits)
    composition = None
    if splits["calibration"]:
        if (mixed := mixture if questions is None else asked_mixture) is not None:
            asking = [record for record in graded if task.gradable(record)]
            present = {record.strata[STRATUM] for record in asking}
            parts = tuple(part for part in mixed.sources if part.stratum in present)  # others are learned from alone
            graded = drawn(asking, mixed.model_copy(update={"sources": parts}), config.seed, repeat=False)
        composition = composition_distance(splits["calibration"], graded, config.seed)
    return Prepared(splits, shots, composition, drops, read, asked)


def _shown_keys(data: DataConfig) -> set[str]:
    """Of the config's own examples, which stand before every question."""
    own = data.examples if not data.few_shot else ()
    return {Record(prompt=(Message("user", one.question),)).key for one in own}


def _not_shown(data: DataConfig, records: list[Record], drops: DropReport) -> list[Record]:
    """Without the questions that stand, with their answers, before every question."""
    shown = _shown_keys(data)
    for record in records if shown else ():
        if record.key in shown:
            drops.drop("one of data.examples", record.origin or record.question)
    return [record for record in records if record.key not in shown] if shown else records


def _add_shown(config: RunConfig, splits: dict[str, Sequence[Record]]) -> list[Record]:
    """Give the config's own examples a split, and return those for a raw model."""
    data = config.data
    if data.examples and not data.few_shot:
        splits["examples"] = [*prompts_of(data, config.evaluation.max_new_tokens).examples]
    if "examples" in splits:
        return []  # what stands before every question anyway shows the format to the raw model, too
    found: dict[str, Record] = {}
    for record in splits["train"]:
        if len(found) == data.few_shot_raw:
            break
        if record.chosen is not None and record.prompt and not (record.tools or record.calls):
            found.setdefault(record.id, record)
    return list(found.values())


def _prepare_stored(config: RunConfig) -> Prepared:
    """As `prepare`, with the training records left on disk."""
    data, drops, task = config.data, DropReport(strict=config.data.strict), task_of(config.task)
    assert isinstance(data.source, FileSource)
    # What a file of the task's says counts, not only its name.
    section = json.dumps(
        [config.task.model_dump(mode="json"), task.identity(), task.code()], sort_keys=True, default=str
    )
    made = Made(config.seed, config.trains_unpaired, section, partial(_asked, task=task), task.gradable, task.objects)
    if "weight" in data.source.columns and not config.objective.needs.weighs:
        raise UserError(
            f"data.source.columns: objective.name: {config.objective.name} does not weigh its records; leave weight out"
        )
    records = stored_records(data.source, made, cache_directory() / "records", drops)
    read = len(records) + len(drops.unfit)
    if shown := _shown_keys(data):
        keys = np.array([int(one, 16) for one in shown], dtype=np.uint64)
        records = records.where(~np.isin(records.column("key"), keys))
    check_share(drops.unfit, read, data.max_dropped, data.source.called)
    if config.objective.needs.preferences and not records.flagged(REJECTED).any():
        raise UserError(
            "data.source.streaming: no row has a rejected answer, and none can be found without the whole set"
        )
    splits: dict[str, Sequence[Record]] = {}
    held_out, asked = None, None
    graded: Sequence[Record] = records.likenesses()
    gradable = records.where(records.flagged(GRADABLE)).likenesses()
    if data.questions is not None:
        questions, asked = _read_source(config, data.questions, task, drops)
        graded, gradable = questions, list(filter(task.gradable, questions))
        sizes = data.splits.model_copy(update={"train": 0, "validation": 0})
        mixture = data.questions if isinstance(data.questions, MixtureSource) else None
        more = split_records([], sizes, config.seed, questions, drops, gradable=task.gradable, asked_mixture=mixture)
        splits |= more
        held_out = [one for one in questions if getattr(sizes, split_of(one.key, config.seed, EVALUATION_SPLITS))]
    strata = {"calibration.domain": config.calibration.domain, "abstention.groups": config.abstention.groups}
    check_named(gradable, strata)
    splits |= split_stored(records, data.splits, drops, held_out, examples=data.few_shot)
    shots = _add_shown(config, splits)
    composition = None
    if splits["calibration"]:
        composition = composition_distance(splits["calibration"], graded, config.seed)
    return Prepared(splits, shots, composition, drops, read, asked)


def with_examples(config: RunConfig, prepared: Prepared | None = None) -> RunConfig:
    """The config with the examples that `data.few_shot` takes out of the data, as a run writes it down."""
    if not config.data.few_shot or config.data.examples:
        return config
    found = (prepared or prepare(config)).splits["examples"]
    examples = tuple(Example(question=one.question, answer=one.chosen or "", context=one.context) for one in found)
    return config.model_copy(update={"data": config.data.model_copy(update={"examples": examples})})


def _asked(record: Record, task: Task) -> Record:
    """As the task asks it; a text that is learned as it stands asks nothing."""
    asked = task.asked(record) if record.prompt else record
    return asked if asked.prompt == record.prompt else replace(asked, asked_of=record.key)


def _read_source(
    config: RunConfig,
    source: Source,
    task: Task,
    drops: DropReport,
    labelled: bool = False,
    bare: bool = False,
    only_learned: bool = False,
) -> tuple[list[Record], int]:
    """The records of a source as the task asks them, and how many rows were read. UserError where too many cannot serve.

    only_learned: no question is drawn from it, so that what the task cannot ask is learned as it stands.
    """
    known, as_they_stand = len(drops.unfit), 0
    loaded = load_records(source, config.seed, labelled=labelled, bare=bare, objects=task.objects, drops=drops)
    records = []
    for record in loaded:
        try:
            records.append(_asked(record, task))
        except UserError as error:
            if only_learned:
                records.append(record)
                as_they_stand += 1
            else:
                drops.refuse(error, record.origin or record.question, record.question)
    if as_they_stand:
        drops.notes.append(f"{source.called}: {as_they_stand} rows that the task cannot ask are learned as they stand")
    unfit = drops.unfit[known:]
    read = len(records) + len(unfit)
    check_share(unfit, read, config.data.max_dropped, source.called)
    if not records:
        raise UserError(f"{source.called}: the data set is empty")
    return records, read


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


def learned_records(config: RunConfig, records: Sequence[Record], drops: DropReport) -> Sequence[Record]:
    """The training records, whose rejected answers have been found, as the objective learns from them."""
    needs = config.objective.needs
    if needs.statements != "none":
        return with_confidence_statements(records, keep=needs.statements == "added")
    return unpair(records, drops) if config.trains_unpaired else records


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
    template.task.settle()  # what could not be graded counts as wrong there
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

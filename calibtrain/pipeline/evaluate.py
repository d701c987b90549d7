"""Evaluation: a model answers a split's questions, the answers are graded, their confidence is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.calibration.metrics import summary_of
from calibtrain.calibration.scores import TEMPERATURE_GRID, TokenScores
from calibtrain.confidence.answered import Answered, answer_table, token_logprob_table
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead, has_head
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.config import RunConfig
from calibtrain.data.templates import Template, template_of
from calibtrain.distributed import all_agree
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import torch_dtype
from calibtrain.models.loading import answering_config, load_model, load_tokenizer
from calibtrain.models.loss_model import Call, LossModel
from calibtrain.models.policy import Policy, check_head
from calibtrain.models.sharding import inference_settings, run_sharded
from calibtrain.pipeline import team
from calibtrain.pipeline.calibration_file import made_by, made_by_source, weights_hash
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.options import options_part, print_options
from calibtrain.pipeline.prepare import prepare, with_examples
from calibtrain.records import Record
from calibtrain.training.deepspeed_config import sharding


class Answering(Protocol):
    """Who answers: a model in this process (Loaded), or one behind an address (pipeline.served.Served)."""

    config: RunConfig
    template: Template
    name: str  # for people
    graded: bool  # whether answers are graded: not in service

    def measure(
        self, records: Sequence[Record], shots: Sequence[Record] = (), on_batch: Any = lambda questions_done: None
    ) -> Measurement:
        """Answer and grade `records`."""
        ...

    def mark(self) -> str:
        """Mark of who answers, for the lines of a file of answers."""
        ...


class Loaded:
    """A model with its template, ready to answer."""

    def __init__(self, config: RunConfig, model: Path | None = None) -> None:
        """Load `model` (a Hugging Face directory), or the one that the config starts from."""
        source = answering_config(config.model, model)
        self.config = config = with_examples(config)
        self.graded = True
        self.directory = model
        self.name = str(model or config.model.source)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.template = template_of(config, load_tokenizer(source))
        self.head: FittedHead | None = None  # whose scores `measure` gives as well
        self.team, zero, dtype = team.current(), None, torch_dtype(source)
        if self.team is not None:
            self.team.load(self, config, model)
            self.device = self.team.world.device
            zero = sharding(config, 1)  # what was divided to be trained may fit into no single process
        self.lockstep = zero is not None  # all ranks run the same passes, on weights that lie in parts
        section = {} if zero is None else zero["zero_optimization"]
        module = LossModel(Policy(load_model(source, zero and inference_settings(dtype, section)))).eval()
        self._model = module.to(self.device) if zero is None else run_sharded(module, dtype, section).module
        self._model(Call(lambda one: check_head(one.policy)))

    @property
    def model(self) -> LossModel:
        """The model, which this process holds whole. UserError where it lies in parts."""
        if self.lockstep:
            raise UserError(
                "training.zero_stage: 3 divides the model over the processes, and this needs it whole: leave out "
                "--num-processes, or let a server answer (--engine http://...)"
            )
        return self._model

    def answer(
        self,
        records: Sequence[Record],
        shots: Sequence[Record] = (),
        on_batch: Any = lambda questions_done: None,
        layers: tuple[int, ...] = (),
    ) -> Answered:
        """Graded answers of this process with their hidden states, and with what a confidence head reads of `layers`."""
        return answer_questions(
            self._model,
            self.template,
            records,
            self.config.evaluation,
            shots=shots,
            device=self.device,
            graded=self.graded,
            all_done=(lambda done: all_agree(done, self.device)) if self.lockstep else bool,
            share_prefix=not self.lockstep,
            layers=layers,
            on_batch=on_batch,
        )

    def mark(self) -> str:
        """Mark of the model and template."""
        if self.directory is None:
            return made_by_source(self.config.model)
        return made_by(weights_hash(self.directory), self.template.hash)

    def measure(
        self, records: Sequence[Record], shots: Sequence[Record] = (), on_batch: Any = lambda questions_done: None
    ) -> Measurement:
        """Answer and grade `records`."""
        by_token = self.config.calibration.method == "adaptive_temperature"
        if by_token and any(self.template.task.options(record) for record in records):
            raise UserError(
                "calibration.method: adaptive_temperature reads the tokens of generated answers, and these are chosen among "
                "options: take temperature, vector_scaling or matrix_scaling"
            )
        if self.team is not None:
            return self.team.measure(self, records, shots, on_batch)
        return self.measure_alone(records, shots, on_batch)

    def measure_alone(self, records: Sequence[Record], shots: Sequence[Record], on_batch: Any) -> Measurement:
        """Answer and grade `records` in this process; in lockstep every rank must ask as many."""
        by_token = self.config.calibration.method == "adaptive_temperature"
        answered = self.answer(records, shots, on_batch, () if self.head is None else self.head.layers)
        by_head: dict[str, Any] = {}
        if self.head is not None:
            by_head = {"told": self.head.score(answered).values, "told_by": self.head.mark}
        features = answered.features
        asked = None if answered.asked is None else answered.asked.numpy()
        if not by_token:
            whole = answer_table(self._model, answered, TEMPERATURE_GRID, self.device)
            return Measurement(answered.answers, whole.numpy(), states=asked, **by_head)
        per_token = token_logprob_table(self._model, features, TEMPERATURE_GRID, self.device).numpy()
        owner = features.sequence_ids.numpy()
        table = np.zeros((len(answered.answers), len(TEMPERATURE_GRID)))
        np.add.at(table, owner, per_token)
        tokens = TokenScores(per_token, features.hidden.float().numpy(), owner)
        return Measurement(answered.answers, table, tokens, states=asked, **by_head)


def run(
    config: RunConfig,
    *,
    model: Path | None,
    split: str,
    output: Path | None,
    load: Callable[[RunConfig, Path | None], Answering] = Loaded,
) -> dict[str, float]:
    """Measure a model on a split and print the numbers; the starting model is shown examples of the format first.

    load: makes who answers of the config and `model`; `partial(Served, url=...)` asks a server of it instead.
    """
    if output is not None:
        _check_output(output)
    prepared = prepare(config)
    records = prepared.splits[split]
    if not records:
        raise UserError(f"data.splits.{split}: 0 questions; ask for some in the config")
    loaded = load(config, model)
    if isinstance(loaded, Loaded):
        loaded.head = head_beside(model, loaded.template)
    shots = () if model is not None else prepared.shots
    measurement = with_progress(loaded, records, shots, f"answering {split}", settle=False)
    if output is not None:
        try:
            write_measurement(measurement, output, loaded.mark())
        except OSError as error:
            raise UserError(f"--output: {output} cannot be written: {error.strerror or error}") from None
    loaded.template.task.settle()
    logprobs = np.array([min(0.0, one.logprob) for one in measurement.answers])
    metrics = measured_metrics(measurement.confidence, measurement.correct, logprobs)
    _print(metrics, f"{loaded.name}, {split}")
    if measurement.told is not None:
        _print(measured_metrics(measurement.told, measurement.correct), "by its confidence head")
    print_options(options_part(loaded.template.task.options_are, measurement.answers))
    if missing := sum(not one.found for one in measurement.answers):
        print(f"{missing} of {len(measurement.answers)} replies hold no answer, and are graded as wrong")
    if loaded.template.task.judged:
        _tell_of_the_judge(replace(measurement, made_by=loaded.mark()), model)
    return metrics


def _check_output(path: Path) -> None:
    """Raise UserError where no file can be written at `path`: it would be told after hours of answering."""
    try:
        if path.is_dir():
            raise UserError(f"--output: {path} is a directory; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror or error}") from None


def head_beside(model: Path | None, template: Template) -> FittedHead | None:
    """The confidence head beside a model; None where there is none, or it is said to be another model's."""
    if model is None or not has_head(model.parent):
        return None
    try:
        return FittedHead.load(model.parent, Fingerprint(weights_hash(model), template.hash))
    except UserError as error:
        print(f"left out: {error}")
        return None


def with_progress(
    loaded: Answering, records: Sequence[Record], shots: Sequence[Record], label: str, *, settle: bool = True
) -> Measurement:
    """`Loaded.measure` under a progress bar. Raises UserError, before it starts, where answers could not be graded.

    And afterwards, where a grade is missing, unless `settle` is False: the caller writes the answers, and settles then.
    """
    loaded.template.task.ready(records)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{label}: {len(records)} questions", highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=len(records))
        found = loaded.measure(records, shots, lambda done: progress.update(task, completed=done))
    if settle:
        loaded.template.task.settle()
    return found


def measured_again(loaded: Answering, records: Sequence[Record], path: Path, made_by: str, split: str) -> Measurement:
    """Answers to `records`, written to `path` and read from there, as rounded: whoever reads them later finds the same.

    What an earlier call left at `path` because it could not grade it is graded anew and not answered again, if model,
    template, questions and what is read in the replies are the same. Raises UserError where a grade is missing, once all is
    written.
    """
    left = _left_ungraded(loaded, records, path, made_by)
    found = left or with_progress(loaded, records, (), f"answering {split}", settle=False)
    write_measurement(found, path, made_by)
    loaded.template.task.settle()
    return replace(read_measurement(path), states=found.states, told=found.told, told_by=found.told_by)


def _left_ungraded(loaded: Answering, records: Sequence[Record], path: Path, made_by: str) -> Measurement | None:
    """The answers at `path` with new grades; None where there are none, or not to these records as they are read now."""
    try:
        left = read_measurement(path)
    except UserError:
        return None
    task = loaded.template.task
    config = loaded.config.output_dir / "config.yaml"
    head = loaded.head if isinstance(loaded, Loaded) else None
    ours = (left.made_by, left.told_by) == (made_by, head and head.mark)
    ours = ours and [one.question_id for one in left.answers] == [record.id for record in records]
    if not ours or all(one.correct is not None for one in left.answers):
        return None
    if not config.is_file() or config.stat().st_mtime > path.stat().st_mtime:
        return None  # answered under other settings, perhaps
    readings = [task.read(one.said, record) for one, record in zip(left.answers, records, strict=True)]
    if [one.text for one in readings] != [one.text for one in left.answers]:
        return None
    task.ready(records)
    grades = task.grades(readings, records)
    pairs = zip(left.answers, grades, strict=True)
    return replace(left, answers=[replace(one, correct=grade.correct) for one, grade in pairs])


def measured_metrics(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], order: NDArray[np.float64] | None = None
) -> dict[str, float]:
    """All metrics of graded answers, which `order` (N,) ranks where it is given."""
    return summary_of(confidence, correct, order)


SHOWN = {
    "acc": "accuracy",
    "mean_conf": "mean confidence",
    "ece15": "ECE (15 bins)",
    "ece_null": "  of a calibrated model",
    "ece_debiased": "  debiased",
    "brier": "Brier",
    "auroc": "AUROC",
    "aurc": "AURC",
}


def _tell_of_the_judge(measurement: Measurement, model: Path | None) -> None:
    from rich.console import Console

    from calibtrain.pipeline.judged import corrected_line  # which reads answers by this module

    Console(highlight=False, soft_wrap=True).print(corrected_line(measurement, model), markup=False)


def _print(metrics: dict[str, float], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, label in SHOWN.items():
        if key in metrics:
            table.add_row(label, "n/a" if math.isnan(metrics[key]) else f"{metrics[key]:.3f}")
    Console().print(table)

"""What is to be quantised: a finished run, or any model with questions, and where its artefact goes; checked beforehand."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibtrain.confidence.scorer import HEAD
from calibtrain.config import FileSource, RunConfig, SFTConfig, SplitSizes
from calibtrain.config_data import DataConfig
from calibtrain.data.drops import DropReport
from calibtrain.data.sources import load_records
from calibtrain.data.splits import EVALUATION_SPLITS, split_of, unique_records
from calibtrain.errors import UserError
from calibtrain.models.loading import answering_config, load_settings
from calibtrain.pipeline.calibration_file import read_calibration, served_source, weights_hash
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.quantization.run import ALPHA, ROTATED_ALPHA
from calibtrain.quantization.schemes import OBSERVERS, Scheme
from calibtrain.records import Record

logger = logging.getLogger(__name__)

DATA_FILE = "quantization.json"
FULL_ANSWERS = "full_test.jsonl"
"""In the artefact's answers/: what the full-precision model answered to the same test questions."""
FEWEST, USUAL, DEFAULT, MOST = 16, 128, 256, 512
"""Calibration questions: with fewer than USUAL what is found moves with the draw, more than MOST change nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command asks for."""

    scheme: Scheme
    method: str
    ignore: tuple[str, ...] = ()
    alpha: float | None = None  # None: ALPHA of quantization.run, or its ROTATED_ALPHA
    rotate: bool = False
    samples: int | None = None  # None: DEFAULT, or as many as there are down to USUAL
    keep: Mapping[str, float] | None = None  # of quantize_gate
    output: Path | None = None
    questions: Path | None = None  # of a model that is no run
    template: str | None = None

    @property
    def name(self) -> str:
        """Of the artefact's folder, unless --output says another: what else is asked for makes another artefact."""
        scheme = self.scheme
        more = ["static"] if scheme.static else []
        more += [scheme.observer] if scheme.static and scheme.observer != OBSERVERS[0] else []
        more += ["kv8"] if scheme.kv_cache else []
        return "-".join([scheme.name, self.method, *more, *(["rotated"] if self.rotate else [])])

    @property
    def strength(self) -> float:
        """How far outliers go to the weights."""
        if self.alpha is not None:
            return self.alpha
        return ROTATED_ALPHA if self.rotate else ALPHA

    def settings(self) -> dict[str, Any]:
        """What beside scheme and method makes the artefact what it is."""
        scheme = self.scheme
        return {
            "group_size": scheme.group_size,
            "asymmetric": not scheme.weights.symmetric,
            "static": scheme.static,
            "observer": scheme.observer if scheme.static else None,
            "kv_cache": scheme.kv_cache,
            "ignore": list(self.ignore),
            "alpha": self.strength,
            "rotate": self.rotate,
            **({} if self.samples is None else {"samples": self.samples}),
        }


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in full precision, with the config by which it is asked."""

    model: Path
    config: RunConfig
    home: Path  # its answers lie in home/answers
    target: Path
    run: Path | None  # the output_dir, where it is one

    @property
    def work(self) -> Path:
        """Where the artefact is made."""
        return self.target.with_name(self.target.name + ".partial")

    @property
    def refused(self) -> Path:
        """Where what was measured is kept when the artefact is refused."""
        return self.target.with_name(self.target.name + ".refused")


def subject_of(source: Path, asked: Asked) -> Subject:
    """The finished run, or the model with its questions. UserError for what is neither, and for what cannot be quantised."""
    name = asked.name
    if (source / "config.yaml").is_file():
        subject = _of_run(source, asked, source / "quantized" / name)
    elif (source / "config.json").is_file():
        subject = _of_model(source, asked, Path("quantized") / name)
    else:
        raise UserError(
            f"{source}: neither the output_dir of a run (config.yaml) nor a Hugging Face directory (config.json)"
        )
    _check_model(subject.model, source)
    _check_target(subject, asked)
    return subject


def _of_run(source: Path, asked: Asked, target: Path) -> Subject:
    if (source / DATA_FILE).is_file():
        raise UserError(f"{source}: is quantised already ({DATA_FILE}); quantise the run that it was made of")
    if asked.questions is not None or asked.template is not None:
        raise UserError("--questions and --template go with a Hugging Face directory; a run has its own in config.yaml")
    if not (source / "model" / "config.json").is_file():
        raise UserError(f"{source}: no exported model (model/config.json); train first")
    _check_model(source / "model", source)
    read_calibration(source)  # what is lost is told from it
    if served_source(source) == HEAD:
        logger.warning(
            "%s answers by its confidence head, which holds for its own weights alone: likelihoods are compared, and the "
            "quantised model answers by its likelihood",
            source,
        )
    return Subject(source / "model", config_of_run(source), source, (asked.output or target).resolve(), source)


def _of_model(source: Path, asked: Asked, target: Path) -> Subject:
    if asked.questions is None:
        raise UserError(f"{source}: a Hugging Face directory; give graded questions with --questions FILE.jsonl")
    if not asked.questions.is_file():
        raise UserError(f"--questions: no such file: {asked.questions}")
    if asked.template not in (None, "plain", "chat"):
        raise UserError(f"--template: {asked.template!r} is neither plain nor chat")
    target = (asked.output or target).resolve()
    return Subject(source, _config_of(source, asked, target), target.parent, target, None)


def _config_of(source: Path, asked: Asked, target: Path) -> RunConfig:
    """A config by which the model is asked these questions, in splits as large as they allow."""
    from calibtrain.config import ModelConfig

    assert asked.questions is not None
    template = asked.template or ("chat" if _has_chat_template(source) else "plain")
    file = FileSource(kind="file", path=asked.questions.resolve())
    config = RunConfig(
        name=source.resolve().name,
        output_dir=target,
        model=answering_config(ModelConfig(), source.resolve()),
        # As a source of questions alone, else half of them would be kept for training.
        data=DataConfig(source=file, questions=file, template=template),  # type: ignore[arg-type]
        objective=SFTConfig(),
    )
    found = split_counts(load_records(file, config.seed, drops=DropReport()), config.seed)
    wanted = SplitSizes()
    sizes = {name: min(found[name], getattr(wanted, name)) for name in EVALUATION_SPLITS}
    if any(count < FEWEST for count in sizes.values()):
        told = ", ".join(f"{name} {count}" for name, count in sizes.items())
        raise UserError(
            f"--questions: {asked.questions} holds {sum(found.values())} questions with accepted answers ({told}); each "
            f"split needs {FEWEST} or more, which takes about {8 * FEWEST} questions"
        )
    data = config.data.model_copy(update={"splits": SplitSizes(train=0, **sizes)})
    return config.model_copy(update={"data": data})


def split_counts(records: list[Record], seed: int) -> Counter[str]:
    """How many graded questions fall into each split that is not trained on."""
    from calibtrain.data.drops import DropReport

    graded = unique_records([one for one in records if one.accepted], DropReport(), by=lambda one: one.key)
    return Counter(split_of(one.key, seed, EVALUATION_SPLITS) for one in graded)


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def _check_model(model: Path, source: Path) -> None:
    """UserError for a model without safetensors, and for one that is quantised."""
    try:
        settings: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{model / 'config.json'}: cannot be read ({error})") from error
    known = settings.get("quantization_config")
    if known is not None:
        method = known.get("quant_method", "unknown") if isinstance(known, dict) else "unknown"
        raise UserError(f"{source}: is quantised already ({method}); quantise the full-precision model it was made of")
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{model}: no safetensors weights")


def _check_target(subject: Subject, asked: Asked) -> None:
    """UserError where the artefact would take the place of what is not one of these weights, by the same settings."""
    target, elsewhere = subject.target, "give another --output, or delete it"
    if target in (subject.model.resolve(), subject.home.resolve()) and target.exists():
        raise UserError(f"--output: {target} is what is quantised; {elsewhere}")
    if not target.exists():
        return
    try:
        content = json.loads((target / DATA_FILE).read_text(encoding="utf-8"))
        found, made = content["source_hash"], {**content.get("settings", {})}
    except (OSError, ValueError, KeyError, TypeError):
        if target.is_dir() and not any(target.iterdir()):
            return
        raise UserError(f"{target}: exists and is no quantised model of calibtrain; {elsewhere}") from None
    if found != weights_hash(subject.model):
        raise UserError(f"{target}: a quantised model of other weights than {subject.model}; {elsewhere}")
    made |= {key: content[key] for key in ("scheme", "method") if key in content}
    wanted = {"scheme": asked.scheme.name, "method": asked.method, **asked.settings()}
    # What an earlier version does not say could not be set then.
    if other := [f"{key}: {made[key]}" for key, value in wanted.items() if made.get(key, value) != value]:
        raise UserError(f"{target}: was made otherwise ({', '.join(other)}); {elsewhere}")


def check_space(subject: Subject, scheme: Scheme, *, rotate: bool = False) -> None:
    """UserError where the disk has no room for the artefact while it is made. rotate: a tied head is written beside it."""
    size = sum(file.stat().st_size for file in subject.model.glob("*.safetensors"))
    # Blocks are written one by one and then joined, beside what stays in full precision.
    needed = int(size * min(1.0, (scheme.weights.bits + 2) / 16) * 2) + (64 << 20)
    if rotate:
        source = answering_config(subject.config.model, subject.model)
        settings = load_settings(source).get_text_config()
        needed += 2 * settings.vocab_size * settings.hidden_size
    folder = next(one for one in (subject.target, *subject.target.parents) if one.exists())
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; give another --output")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, and a {scheme.name} copy of {subject.model} may need "
            f"{needed / 1e9:.1f} GB while it is made; make room or give --output on another disk"
        )


def samples_of(asked: int | None, available: int) -> int:
    """How many calibration questions to take. UserError that says how many there are."""
    if asked is None:
        if available >= USUAL:
            return min(DEFAULT, available)
        raise UserError(
            f"{available} calibration questions, and {USUAL} to {MOST} are usual: raise data.splits.calibration, or say "
            f"--samples {available} to go on with these"
            if available >= FEWEST
            else _too_few(available)
        )
    if not FEWEST <= asked <= MOST:
        raise UserError(f"--samples: {asked} is not between {FEWEST} and {MOST}; {USUAL} to {MOST} are usual")
    if asked > available:
        raise UserError(
            f"--samples: {asked} asked for, and the calibration split has {available}; say --samples {available}, or raise "
            "data.splits.calibration"
            if available >= FEWEST
            else _too_few(available)
        )
    return asked


def _too_few(available: int) -> str:
    return (
        f"{available} calibration questions are too few to quantise by (at least {FEWEST}); raise "
        "data.splits.calibration or bring more questions"
    )

"""The full-precision model before it is quantised: the texts to quantise by, its answers, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibtrain.confidence.generation import generate, keep_none
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate
from calibtrain.pipeline.answer_parts import fit_answer_parts
from calibtrain.pipeline.calibration_file import Calibrated, made_by, read_calibration, weights_hash, write_json
from calibtrain.pipeline.evaluate import Loaded, with_progress
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.prepare import Prepared
from calibtrain.pipeline.quantize_cost import Memory, cost
from calibtrain.pipeline.quantize_source import Subject
from calibtrain.quantization.blocks import Text
from calibtrain.records import Record

TEXTS_FILE = "texts.json"


@dataclass(frozen=True, slots=True)
class Full:
    """The full-precision model: its answers, calibration, marks and cost; the model itself is gone from memory."""

    texts: list[Text]
    measured: dict[str, Measurement]
    calibrated: Calibrated
    template_hash: str
    weights_hash: str
    cost: dict[str, Any]


def full_precision(subject: Subject, prepared: Prepared, chosen: Sequence[Record]) -> Full:
    """Texts to quantise by, and the full-precision model's answers, of which those that are kept are not made again."""
    config = subject.config
    memory = Memory()
    loaded = Loaded(config, subject.model)
    hashes = (loaded.template.hash, weights_hash(subject.model))
    mark = made_by(hashes[1], hashes[0])
    texts = _texts(loaded, chosen, subject.work / TEXTS_FILE, f"{mark} {data_hash(chosen)}")
    costs = cost(subject.model, loaded, memory.peak())
    answers, measured = subject.home / "answers", {}
    needed = ("test", "certification") if subject.run is not None else ("test", *calibrate.SPLITS)
    for split in needed:
        path = answers / f"{split}.jsonl"
        found = kept_answers(path, mark, prepared.splits[split])
        if found is None:
            found = with_progress(loaded, prepared.splits[split], (), f"answering {split} in full precision")
            if subject.run is None or split == "test":
                write_measurement(found, path, mark)
                found = read_measurement(path)  # as rounded there, and by the next command
        measured[split] = found
    if subject.run is not None:
        calibrated = read_calibration(subject.run, template_hash=hashes[0])
    else:
        calibrator = calibrate.fit(config, measured["temperature"], *hashes)
        promise = config.abstention
        parts = fit_answer_parts(measured["temperature"].answers, *hashes)
        calibrated = calibrate.certified(
            config, calibrator, measured["certification"], promise.target_risk, promise.delta, parts=parts
        )
    del loaded
    return Full(texts, measured, calibrated, *hashes, costs)


def kept_answers(path: Path, mark: str, records: Sequence[Record]) -> Measurement | None:
    """Answers of an earlier command, where they are this model's and to these questions."""
    if not path.is_file():
        return None
    try:
        found = read_measurement(path)
    except UserError:
        return None
    same = [one.question_id for one in found.answers] == [one.id for one in records]
    return found if found.made_by == mark and same else None


def _texts(loaded: Loaded, records: Sequence[Record], path: Path, key: str) -> list[Text]:
    """Prompts with the model's own greedy answers; kept, so that an interrupted run goes on with the same."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return [Text(tuple(one["prompt"]), tuple(one["answer"])) for one in kept["texts"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = own_answers(loaded, records)
    texts = [{"prompt": list(one.prompt), "answer": list(one.answer)} for one in found]
    write_json(path, {"key": key, "texts": texts})
    return found


def own_answers(loaded: Loaded, records: Sequence[Record], shots: Sequence[Record] = ()) -> list[Text]:
    """What to quantise by: each prompt with what the model itself answers; its thinking counts to the prompt.

    Where it chooses among options, the reply that it chose.
    """
    template, settings = loaded.template, loaded.config.evaluation
    prompts = [template.prompt_ids(record, shots) for record in records]
    if any(template.task.options(record) for record in records):
        chosen = [template.completion_ids(one.said) for one in loaded.answer(records, shots).answers]
        return [Text(tuple(prompt), tuple(reply)) for prompt, reply in zip(prompts, chosen, strict=True)]
    made = generate(
        loaded.model,
        prompts,
        **template.ending,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        device=loaded.device,
        keep=keep_none,
    )
    texts = []
    for prompt, (one,) in zip(prompts, made, strict=True):
        start = template.answer_start(one.tokens) or 0
        start = start if start < len(one.tokens) else 0
        texts.append(Text((*prompt, *one.tokens[:start]), one.tokens[start:]))
    return texts

"""Sources of confidence on a run's held-out questions: scored, calibrated on another split, compared with their cost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.calibration.metrics import brier, ece, ece_debiased
from calibtrain.calibration.ranking import aurc, auroc
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import Answered
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead, has_head
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.confidence.probe import Probe
from calibtrain.confidence.scorer import HEAD, PROBES, probe_scores
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.confidence.sources import FAMILIES, SOURCES, families_of
from calibtrain.errors import UserError
from calibtrain.lines import lines_of
from calibtrain.models.loss_model import AnswerFeatures
from calibtrain.pipeline import probe
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Record

Array = NDArray[np.float64]

SPLITS = {"calibrate": "temperature", "measure": "test"}
"""What each split of the run is for. The certification split stays untouched."""
FREE = next(iter(FAMILIES))
"""Sources that need the hidden states which answering leaves."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Graded answers with their scores by source."""

    answers: list[Answer]
    scores: dict[str, SourceScores]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Grades (N,)."""
        return np.array([bool(answer.correct) for answer in self.answers])

    @property
    def ids(self) -> list[str]:
        """Question ids, which the bootstrap resamples by."""
        return [answer.question_id for answer in self.answers]


def run(output_dir: Path, *, sources: Sequence[str] | None = None, questions: int | None = None) -> dict[str, Any]:
    """Score, calibrate and compare; writes OUT/confidence/. `questions` limits each split. Returns the table."""
    names = _names(output_dir, sources)
    config = config_of_run(output_dir)
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    prepared = prepare(config)
    for use, split in SPLITS.items():
        if not prepared.splits[split]:
            raise UserError(f"data.splits.{split}: 0 questions; comparing sources needs some to {use}")
    loaded = Loaded(config, model)
    fingerprint = Fingerprint(weights_hash(model), loaded.template.hash)
    asker = asker_of(loaded)
    probes = probe.load_probes(output_dir, fingerprint)
    if absent := [name for name in names if name in PROBES and name not in probes]:
        raise UserError(f"--sources: {', '.join(absent)} is not fitted; run `calibtrain probe {output_dir}` first")
    probes = {name: one for name, one in probes.items() if name in names}
    head = FittedHead.load(output_dir, fingerprint) if HEAD in names else None
    folder = output_dir / "confidence"
    found: dict[str, Scored] = {}
    for use, split in SPLITS.items():
        records = prepared.splits[split][:questions]
        found[use] = score_split(asker, records, folder / "work" / split, names, fingerprint, head)
        found[use] = with_probes(found[use], asker, records, probes, fingerprint)
    rows = []
    for name in names:
        calibrator = probe.fit_platt(
            found["calibrate"].scores[name].values, found["calibrate"].correct, found["calibrate"].ids, fingerprint
        )
        rows.append(row_of(name, found["measure"], calibrator.apply(found["measure"].scores[name].values)))
    table = {"n": len(found["measure"].answers), "questions": questions, "sources": rows}
    _write(folder / "table.json", json.dumps(table, indent=2))
    _write(folder / "scores.jsonl", "".join(_lines(found["measure"], names)))
    _print(table, folder)
    return table


def score_split(
    asker: Asker,
    records: Sequence[Record],
    folder: Path,
    names: Sequence[str],
    fingerprint: Fingerprint,
    head: FittedHead | None = None,
) -> Scored:
    """Answers to `records` and their scores; what `folder` holds already of the same model and questions is not redone.

    head: scores the answers as well, under the name HEAD.
    """
    asked = [*asdict(fingerprint).values(), asker.seed, asker.settings.model_dump(), [shot.id for shot in asker.shots]]
    key = hashlib.sha256(json.dumps([*asked, [record.id for record in records]]).encode()).hexdigest()[:16]
    folder = folder / key
    path = folder / "answers.jsonl"
    named = [name for name in names if name in SOURCES]
    families = families_of([*named, "likelihood"])
    answered: Answered | None = None
    own = None if head is None else _file(folder, (HEAD,), head.mark)
    kept = [path, *(_file(folder, FREE, name) for name in FREE), *([] if own is None else [own])]
    if not all(one.is_file() for one in kept):
        answered = answer_questions(
            asker.module,
            asker.template,
            records,
            asker.settings,
            shots=asker.shots,
            device=asker.device,
            layers=() if head is None else head.layers,
        )
        asker.template.task.settle()  # before anything is kept: a grade that is missing would be missed for good
        for name, scores in families[FREE](asker, records, answered).items():
            _keep(_file(folder, FREE, name), scores)
        if head is not None and own is not None:
            _keep(own, head.score(answered))
        # Last, so that answers on disk always have the scores that only they can give.
        lines = [json.dumps({**asdict(answer), "strata": dict(answer.strata)}) for answer in answered.answers]
        _write(path, "\n".join(lines) + "\n")
    answers = [_answer(line) for line in lines_of(path.read_text(encoding="utf-8"))]
    if answered is None:
        nothing = torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        answered = Answered(answers, AnswerFeatures(*nothing, torch.zeros(len(answers))))
    found: dict[str, SourceScores] = {}
    for members, family in families.items():
        if not all(_file(folder, members, name).is_file() for name in members):
            for name, scores in family(asker, records, answered).items():
                _keep(_file(folder, members, name), scores)
        found.update({name: _kept(_file(folder, members, name)) for name in members})
    if own is not None:
        found[HEAD] = _kept(own)
    return Scored(answers, found)


def measures(state: CalibrationState) -> dict[str, float]:
    """What sources are compared by."""
    return {
        "auroc": auroc(state),
        "aurc": aurc(state),
        "ece15": ece(state),
        "ece_debiased": ece_debiased(state),
        "brier": brier(state),
    }


def row_of(name: str, measured: Scored, calibrated: Array) -> dict[str, Any]:
    """One source: its measures before and after calibration, cost of an answer, replies that could not be read."""
    scores = measured.scores[name]
    correct = torch.from_numpy(measured.correct)
    before, after = (measures(state_of(torch.from_numpy(one), correct)) for one in (scores.values, calibrated))
    return {
        "source": name,
        "probability": scores.probability,
        **{f"{key}_raw": value for key, value in before.items()},
        **{f"{key}_calibrated": value for key, value in after.items()},
        **scores.cost.mean(),
        "failed": scores.num_failed,
    }


def parse_sources(text: str | None) -> tuple[str, ...] | None:
    """Sources of "likelihood,p_true"; None without any."""
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _names(output_dir: Path, sources: Sequence[str] | None) -> list[str]:
    """Sources to score; by default all, and the probes where the run has them."""
    if sources is None:
        probed = (output_dir / "probe" / "p_ik" / "probe.json").is_file()
        return [*SOURCES, *(PROBES if probed else ()), *([HEAD] if has_head(output_dir) else [])]
    families_of([name for name in sources if name not in (*PROBES, HEAD)])
    return list(sources)


def asker_of(loaded: Loaded) -> Asker:
    """A run's model as sources ask it."""
    config = loaded.config
    return Asker(loaded.model, loaded.template, config.evaluation, device=loaded.device, seed=config.seed)


def with_probes(
    scored: Scored, asker: Asker, records: Sequence[Record], probes: Mapping[str, Probe], fingerprint: Fingerprint
) -> Scored:
    """The answers with the scores of these probes too."""
    texts = [answer.said for answer in scored.answers]
    return Scored(scored.answers, {**scored.scores, **probe_scores(asker, records, texts, probes, fingerprint)})


def _file(folder: Path, members: tuple[str, ...], name: str) -> Path:
    return folder / members[0] / f"{name}.npz"


def _keep(path: Path, scores: SourceScores) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = np.zeros(len(scores.values), dtype=bool) if scores.failed is None else scores.failed
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            values=scores.values,
            forward_passes=scores.cost.forward_passes,
            tokens=scores.cost.tokens,
            probability=np.array(scores.probability),
            failed=failed,
        )
    os.replace(partial, path)


def _kept(path: Path) -> SourceScores:
    with np.load(path, allow_pickle=False) as file:
        cost = Cost(file["forward_passes"], file["tokens"])
        return SourceScores(file["values"], cost, bool(file["probability"]), file["failed"])


def _answer(line: str) -> Answer:
    values = json.loads(line)
    return Answer.from_dict(values)


def _lines(measured: Scored, names: Sequence[str]) -> list[str]:
    """One JSON object an answer."""
    return [
        json.dumps(
            {
                "question_id": answer.question_id,
                "question": answer.question,
                "answer": answer.text,
                "correct": answer.correct,
                "scores": {name: float(measured.scores[name].values[row]) for name in names},
            },
            ensure_ascii=False,
        )
        + "\n"
        for row, answer in enumerate(measured.answers)
    ]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def _print(table: Mapping[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{table['n']} test questions", title_justify="left")
    for column in ("source", "AUROC", "ECE", "ECE calibrated", "forward passes", "tokens", "unread"):
        shown.add_column(column, justify="left" if column == "source" else "right", no_wrap=column == "source")
    for row in table["sources"]:
        shown.add_row(
            row["source"],
            f"{row['auroc_raw']:.3f}",
            f"{row['ece15_raw']:.3f}" if row["probability"] else "-",
            f"{row['ece15_calibrated']:.3f}",
            f"{row['forward_passes']:.1f}",
            f"{row['tokens']:.0f}",
            str(row["failed"]),
        )
    console = Console(highlight=False)
    console.print(shown)
    console.print(f"written: {folder}")

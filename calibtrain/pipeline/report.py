"""report.html: one file that says, in words and figures with their intervals, what the model's confidence is worth.

Figures are inline SVG of a few kilobytes rather than plotly's 4.5 MB of script: the file opens at once on a phone, prints,
passes a mail filter and shows its figures without JavaScript; only the slider needs the page's own short script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibtrain.abstention.certificate import Certification
from calibtrain.abstention.groups import GroupCertification
from calibtrain.abstention.strata import GroupRisk
from calibtrain.abstention.words import Scale, scale_of, word_for
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline import page, quantize_page
from calibtrain.pipeline import report_figures as figures
from calibtrain.pipeline.judged import audit_lines
from calibtrain.pipeline.options import OptionsPart
from calibtrain.pipeline.quantize_page import Part
from calibtrain.pipeline.report_head import HeadReport
from calibtrain.pipeline.report_numbers import Stage, comparison, stage_of, threshold_table, words_table
from calibtrain.pipeline.report_parts import PartsReport
from calibtrain.pipeline.report_rewards import reward_figures
from calibtrain.pipeline.scope import Scope, at_least, at_most
from calibtrain.pipeline.spectra_page import report_part

SAMPLES = 8  # answers shown of each kind
GROUPS = 30  # shown of each stratum


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers of one model to the test questions; `confidence` replaces the answers' own, e.g. after temperature."""

    label: str
    answers: Sequence[Answer]
    confidence: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class CompositionRow:
    """Share of one stratum in the calibration set and in what it was drawn from."""

    stratum: str  # "continent"
    value: str  # "Europe"
    source: float
    calibration: float


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows, as plain values. The last of `measured` is the model as it is handed over."""

    run_name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    git_hash: str | None
    data_hash: str | None
    measured: Sequence[Measured]  # before to after, on the same questions: raw, fine-tuned, with temperature
    target_risk: float
    delta: float
    certification: Certification | None = None  # None: not attempted
    certified_curve: Mapping[float, Certification] = field(default_factory=dict)
    composition: Sequence[CompositionRow] = ()
    composition_verdict: str = ""
    scope: Scope | None = None  # the questions that the certificate is about
    outside: int = 0  # held-out questions by which others are told; 0: they are not
    group_risks: Sequence[GroupRisk] = ()  # of the test questions at the certified threshold, the worst first
    groups: GroupCertification | None = None
    audit: Mapping[str, Any] | None = None  # where a judge graded: what a person's audit says of it
    temperature: float | None = None
    training: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    reward_models: Sequence[Mapping[str, Any]] = ()  # of reward_model.json
    bootstrap_replicates: int = 400
    samples: bool = True  # show some questions with their answers
    spectra: Mapping[str, Any] | None = None  # content of spectra.json
    spectra_problem: str = ""  # why it cannot be shown
    quantized: Part | None = None  # of a quantised model: what that cost
    quantization_problem: str = ""  # why it cannot be shown
    options: OptionsPart | None = None  # where answers are one of given options
    options_after: OptionsPart | None = None  # with a calibrator of all their probabilities
    parts: PartsReport | None = None  # where answers are made of parts
    head: HeadReport | None = None  # what the run's confidence head buys
    head_problem: str = ""  # why that cannot be shown


def write_report(output: Path, report: ReportData) -> Path:
    """Write the page to `output`, a file or a directory that gets report.html. Returns the file's path."""
    path = output / "report.html" if output.is_dir() or not output.suffix else output
    return page.write(path, render_report(report))


def render_report(report: ReportData) -> str:
    """The page as text. Questions, answers, names and config are escaped: they are other people's text."""
    words = _words(report)
    return page.render(
        "report.html.j2", _context(report), at_most=at_most, at_least=at_least, word=lambda q: word_for(q, words).name
    )


def _context(report: ReportData) -> dict[str, Any]:
    stages = [stage_of(m.label, m.answers, m.confidence) for m in report.measured]
    # Without answers of the model that training started from, the first stage is the trained one's, as the last is.
    trained = len(stages) > 1 and report.measured[0].answers is not report.measured[-1].answers
    before, after = (stages[0] if trained else None), (stages[-1] if stages else None)
    certificate = report.certification.certificate if report.certification else None
    has_answers = after is not None and after.n > 0
    threshold = certificate.threshold if certificate else None
    table = threshold_table(after, threshold) if has_answers and after else None
    if table is not None:
        table["axes"] = figures.marker_axes(stages)
    return {
        "report": report,
        "parts": report.parts,
        "head": report.head,
        "rewards": reward_figures(report.training),
        "stages": stages,
        "before": before if before is not None and before.n else None,
        "after": after,
        "has_answers": has_answers,
        "missing": sum(not one.found for one in report.measured[-1].answers) if report.measured else 0,
        "certificate": certificate,
        "certified_now": table["rows"][table["certified"]] if table and table["certified"] is not None else None,
        "thresholds": table,
        "comparison": [] if report.quantized else comparison(stages, report.bootstrap_replicates),
        "words": words_table(after, _words(report)) if has_answers and after else [],
        "figures": figures.all_figures(stages, table, report.target_risk, report.training),
        "samples": _samples(report, threshold) if report.samples else [],
        **_strata(report),
        "spectra": report_part(report.spectra) if report.spectra else None,
        "quantization": report.quantized and quantize_page.report_part(report.quantized, samples=report.samples),
        "config": json.dumps(report.config, indent=2, ensure_ascii=False, default=str),
        "curve": sorted(report.certified_curve.items()),
        "options": report.options,
        "options_after": report.options_after,
        "audit_lines": audit_lines(report.audit) if report.audit else [],
    }


def _strata(report: ReportData) -> dict[str, Any]:
    """Groups of the test questions: those that break the promise, and at most GROUPS of each stratum."""
    rows: dict[str, list[GroupRisk]] = {}
    for one in report.group_risks:
        rows.setdefault(one.key, []).append(one)
    left_out = {key: len(found) - GROUPS for key, found in rows.items() if len(found) > GROUPS}
    certified = report.groups.groups if report.groups else {}
    return {
        "broken": [one for one in report.group_risks if one.breaks],
        "group_rows": [one for found in rows.values() for one in found[:GROUPS]],
        "left_out": left_out,
        "by": report.groups.by if report.groups else None,
        "group_certificates": {name: one.certificate for name, one in certified.items()},
    }


def _words(report: ReportData) -> Scale:
    """The scale that the run's config chose."""
    return scale_of(report.config.get("abstention", {}).get("words", "icd203"))


def _samples(report: ReportData, threshold: float | None) -> list[dict[str, Any]]:
    """A few answers of each kind of the last model: wrong ones first, the most confident of them at the top."""
    if not report.measured:
        return []
    last = report.measured[-1]
    confidence = last.confidence if last.confidence is not None else [answer.confidence for answer in last.answers]
    limit = threshold if threshold is not None else 0.0
    rows = [
        {"answer": answer, "confidence": float(q), "kind": _kind(answer, q >= limit)}
        for answer, q in sorted(zip(last.answers, confidence, strict=True), key=lambda pair: -pair[1])
        if answer.correct is not None
    ]
    wrong, right, refused = ([row for row in rows if row["kind"] == kind] for kind in ("wrong", "right", "abstained"))
    return [*wrong[:SAMPLES], *_spread(right), *_spread(refused)]


def _kind(answer: Answer, answered: bool) -> str:
    if not answered:
        return "abstained"
    return "right" if answer.correct else "wrong"


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SAMPLES rows from all over the list, so that it shows more than its extremes."""
    if len(rows) <= SAMPLES:
        return rows
    return [rows[i * (len(rows) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)]


__all__ = ["CompositionRow", "Measured", "ReportData", "Stage", "render_report", "write_report"]

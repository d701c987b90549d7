"""A certified model in service: refusals against hallucinations of audited answers, and an alarm for its certificate.

One line of the audit log is one question, in the order asked: {"abstained": false, "correct": true}; the grade of a
refused one may be null. The log may grow, or go on in another file: what was counted is kept in monitor.json, so that each
line counts once. Lines that also hold the `confidence` of a graded answer, and the `word` where it was logged, are held
against what the words promise. Of lines with the reply's `outside`, the p-value of the question, it counts those told to be
unlike the graded ones, with an alarm where they are more than such questions as were graded would bring.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibtrain.abstention.certificate import Certificate
from calibtrain.abstention.monitor import RiskAlarm
from calibtrain.abstention.words import Scale, WordAudit, audit_words, scale_of, word_for
from calibtrain.calibration.intervals import wilson
from calibtrain.confidence.outside import ALPHA, largest_share
from calibtrain.confidence.scorer import HEAD
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.lines import lines_of
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    read_calibration,
    served_source,
    source_folder,
    write_json,
)
from calibtrain.pipeline.scope import at_most

STATE = "monitor.json"


@dataclass(frozen=True, slots=True)
class Service:
    """Audited questions since the certificate was made."""

    alarm: RiskAlarm  # fed with the answered ones
    n: int  # questions
    n_new: int  # of them counted by this call
    restarted: bool  # the certificate is another than the last call's
    words: tuple[WordAudit, ...] = ()  # of this log's graded confidences; empty without any
    outside: RiskAlarm | None = None  # fed with whether questions were told to be outside; None without any

    @property
    def failed(self) -> bool:
        """Whether the certificate or a word no longer keeps its promise, or too many questions are unlike the graded."""
        strange = self.outside is not None and self.outside.fired
        return self.alarm.fired or strange or not all(word.holds for word in self.words)

    @property
    def refusal_rate(self) -> float:
        """Share of questions refused; NaN without any."""
        return (self.n - self.alarm.n) / self.n if self.n else float("nan")

    @property
    def hallucination_rate(self) -> float:
        """Share of questions answered wrongly; NaN without any."""
        return self.alarm.n_wrong / self.n if self.n else float("nan")


def run(
    output_dir: Path,
    audited: Path,
    *,
    source: str | None = None,
    uncertified: bool = False,
    engine: str | None = None,
    engine_model: str | None = None,
) -> Service:
    """Count the new lines of an audit log, print the rates and say whether the certificate still holds.

    After another certificate, or where another source serves now, the counts and the alarm start anew, with the lines not
    counted yet. uncertified: where nothing is certified, watch the config's target_risk. engine: address of the server whose
    answers these are, watched by its own certificate (`calibrate --engine`); engine_model: the model's id there. Raises
    UserError naming file, line and key for a bad line, for a log without lines or whose counted ones have changed, and
    where nothing is certified.
    """
    named = source is not None or engine is not None
    abstention = load_config(output_dir / "config.yaml").abstention
    calibrated, folder = _watched(output_dir, source, engine, engine_model)
    certificate = calibrated.certification.certificate
    if certificate is None and not uncertified:
        raise UserError(
            f"{folder / 'calibration.json'}: no certificate that could stop holding; certify first, or watch the config's "
            "target_risk by --uncertified"
        )
    risk, delta = (
        (abstention.target_risk, abstention.delta)
        if certificate is None
        else (certificate.risk_bound, certificate.delta)
    )
    state = _read(folder / STATE)
    key = f"uncertified {risk} {delta}" if certificate is None else _key(certificate)
    restarted = bool(state) and state["certificate"] != key
    logs: dict[str, Any] = dict(state.get("logs", {}))
    lines = _lines(audited)
    if not named:
        _add_counted(logs, output_dir, audited.name, lines)
    rows = _rows(audited, lines, _counted(audited, lines, logs))
    goes_on = bool(state) and not restarted
    alarm = RiskAlarm.from_json(json.dumps(state["alarm"])) if goes_on else RiskAlarm(risk, delta)
    if (alarm.target_risk, alarm.delta) != (risk, delta):
        raise UserError(f"{folder / STATE}: its alarm is for another risk; delete it to count from the start")
    alarm.observe_all(not correct for abstained, correct, _ in rows if not abstained)
    outside = _outside(state if goes_on else {}, calibrated.outside, delta)
    outside.observe_all(p_value < ALPHA for *_, p_value in rows if p_value is not None)
    words = _words(audited, lines, scale_of(abstention.words))
    service = Service(
        alarm, (state["n"] if goes_on else 0) + len(rows), len(rows), restarted, words, outside if outside.n else None
    )
    logs[audited.name] = {"lines": len(lines), "sha256": _hash(lines)}
    kept = {"certificate": key, "n": service.n, "logs": logs, "alarm": alarm.as_dict(), "outside": outside.as_dict()}
    write_json(folder / STATE, kept)
    _print(service, certificate)
    return service


def _watched(
    output_dir: Path, source: str | None, engine: str | None, engine_model: str | None
) -> tuple[Calibrated, Path]:
    """The calibration by which the answers were given, and where it lies."""
    if engine is None:
        source = served_source(output_dir) if source is None else source
        return read_calibration(output_dir, source=source), source_folder(output_dir, source)
    if source not in (None, LIKELIHOOD):
        raise UserError(f"--source {source}: a server returns log-probs alone; leave it out with --engine")
    from calibtrain.pipeline.engine import engine_folder, load_served  # which load torch and transformers

    served, calibrated = load_served(output_dir, engine, engine_model)
    return calibrated, engine_folder(output_dir, served)


def _add_counted(logs: dict[str, Any], output_dir: Path, name: str, lines: list[str]) -> None:
    """Note what of a log was counted while the other source served: those answers were given by that one's certificate."""
    for source in (LIKELIHOOD, HEAD):
        other = _read(source_folder(output_dir, source) / STATE).get("logs", {}).get(name)
        if other is None or _hash(lines[: other["lines"]]) != other["sha256"]:
            continue
        if name not in logs or other["lines"] > logs[name]["lines"]:
            logs[name] = other


def _outside(state: dict[str, Any], n: int, delta: float) -> RiskAlarm:
    """Alarm over the share of questions told to be outside.

    Half of delta is for what `n` held-out questions leave open of the share that such questions bring, half for the alarm.
    """
    if state.get("outside"):
        return RiskAlarm.from_json(json.dumps(state["outside"]))
    return RiskAlarm(largest_share(n, delta / 2), delta / 2)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the audited answers, one JSON a line")
    try:
        lines = lines_of(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); give the audited answers, one JSON a line") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: no audited answers in it, by which nothing is known of the certificate")
    return lines


def _counted(path: Path, lines: list[str], logs: dict[str, Any]) -> int:
    """How many lines of the log an earlier call counted. Logs are told apart by name."""
    known = logs.get(path.name)
    if known is None:
        return 0
    if len(lines) < known["lines"] or _hash(lines[: known["lines"]]) != known["sha256"]:
        raise UserError(
            f"{path}: its first {known['lines']} lines are not those that were counted; append to a log, and give a "
            "new log a new name"
        )
    return int(known["lines"])


def _rows(path: Path, lines: list[str], counted: int) -> list[tuple[bool, bool, float | None]]:
    """(abstained, correct, p-value of the question or None) of each new line."""
    rows = []
    for number, line in enumerate(lines[counted:], start=counted + 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: an audited answer is an object, not {type(row).__name__}")
        abstained, correct = row.get("abstained"), row.get("correct")
        if not isinstance(abstained, bool):
            raise UserError(f"{path}:{number}: `abstained` is {abstained!r}; say true or false")
        if not isinstance(correct, bool) and not (abstained and correct is None):
            raise UserError(f"{path}:{number}: `correct` is {correct!r}; grade each given answer true or false")
        outside = row.get("outside")
        if outside is not None and (type(outside) not in (int, float) or not 0 <= outside <= 1):
            raise UserError(f"{path}:{number}: `outside` is {outside!r}; give the reply's p-value in [0, 1], or null")
        rows.append((abstained, bool(correct), outside))
    return rows


def _words(path: Path, lines: list[str], scale: Scale) -> tuple[WordAudit, ...]:
    """Audit of the words of a log's graded confidences; a word that was not logged is the one of its confidence."""
    found: list[tuple[float, bool, str]] = []
    for number, line in enumerate(lines, start=1):
        row = json.loads(line) if line.strip() else {}
        if "confidence" not in row or not isinstance(row.get("correct"), bool):
            continue
        confidence = row["confidence"]
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            raise UserError(f"{path}:{number}: `confidence` is {confidence!r}, not a probability in [0, 1]")
        word = row.get("word", word_for(confidence, scale).name)
        if word not in [one.name for one in scale]:
            raise UserError(f"{path}:{number}: `word` is {word!r}, not one of the config's abstention.words")
        found.append((confidence, row["correct"], word))
    if not found:
        return ()
    confidences, grades, names = zip(*found, strict=True)
    return tuple(audit_words(confidences, grades, scale, words=names))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for log in state["logs"].values():
            int(log["lines"]), str(log["sha256"])
        if type(state["n"]) is not int or state["n"] < int(state["alarm"]["n"]):
            raise ValueError("impossible counts")
        kept = {name: state[name] for name in ("certificate", "n", "logs", "alarm")}
        return {**kept, "outside": state.get("outside")}  # earlier versions did not count it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to count from the start") from error


def _key(certificate: Certificate) -> str:
    return hashlib.sha256(certificate.to_json().encode()).hexdigest()


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _print(service: Service, certificate: Certificate | None) -> None:
    from rich.console import Console

    console, alarm = Console(highlight=False), service.alarm
    if service.restarted:
        console.print("the certificate is a new one: counts and alarm start anew")
    console.print(f"audited questions: {service.n}, of them new {service.n_new}")
    for name, count in (("refused", service.n - alarm.n), ("hallucinated", alarm.n_wrong)):
        if service.n:
            low, high = wilson(count, service.n)
            console.print(f"{name}: {count} ({count / service.n:.1%} of all questions, {low:.1%} to {high:.1%})")
    low, high = alarm.risk_interval()
    promise = f"{'wanted' if certificate is None else 'certified'} at most {at_most(alarm.target_risk)}"
    coverage = "" if certificate is None else f"; certified coverage was {certificate.coverage:.1%}"
    console.print(f"wrong among the {alarm.n} given: {low:.1%} to {high:.1%} at any time (95%), {promise}{coverage}")
    what = "the certificate" if certificate else "the wanted risk"
    if alarm.fired:
        console.print(
            f"ALARM at given answer {alarm.fired_at}: {what} no longer holds (p = {alarm.p_value:.2g}, false "
            f"with probability at most {alarm.delta:g}); certify on new answers",
            style="bold red",
        )
    elif alarm.n == 0:
        console.print(f"no answer that was given has been audited: nothing is known of {what}", style="yellow")
    else:
        console.print(f"no alarm: nothing speaks against {what} (p = {alarm.p_value:.2g})")
    if (strange := service.outside) is not None:
        low, high = wilson(strange.n_wrong, strange.n)
        said = f"unlike the graded questions: {strange.n_wrong} of {strange.n} ({low:.1%} to {high:.1%})"
        bound = f"questions like them bring at most {strange.target_risk:.1%}"
        if strange.fired:
            console.print(
                f"ALARM, {said}; {bound}: the certificate is silent there; grade such ones too", style="bold red"
            )
        else:
            console.print(f"{said}; {bound}")
    for word in service.words:
        if word.n:
            console.print(
                f'"{word.word}" promises {word.band_low:.0%} to {word.band_high:.0%}: {word.right} of {word.n} right '
                f"({word.low:.0%} to {word.high:.0%})" + ("" if word.holds else ": NOT KEPT"),
                style=None if word.holds else "bold red",
            )

"""The report of samples that lm-evaluation-harness logged with --log_samples.

One line is one question under one filter. Multiple choice: a request per option, each answered by [summed log-prob, is
greedy], and `acc`. Generation (`generate_until`): one request, answered by one text or by as many as the task's `repeats`,
and `exact_match`. The harness logs neither numbers nor truth values as such but their text ("-25.6", "False").
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibtrain import __version__
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.stated import read_statement
from calibtrain.errors import UserError, short
from calibtrain.lines import lines_of
from calibtrain.pipeline.report import Measured, ReportData, write_report
from calibtrain.tasks.matching import normalize

QUESTION_KEYS = ("question", "query", "ctx", "problem", "input", "sentence")
UNREPEATED = "none"  # the filter of rows that older harnesses logged without one


def run(samples: Path) -> Path:
    """Write the report beside the samples, as NAME.html."""
    measured = read_samples(samples)
    digest = hashlib.sha256("\n".join(answer.question_id for answer in measured.answers).encode()).hexdigest()
    report = ReportData(
        run_name=samples.stem,
        config={"samples": samples.name},
        versions={"calibtrain": __version__},
        git_hash=None,
        data_hash=digest,
        measured=[measured],
        target_risk=0.2,
        delta=0.05,
    )
    return write_report(samples.with_suffix(".html"), report)


def read_samples(path: Path) -> Measured:
    """Graded answers with confidences of a samples_TASK_DATE.jsonl; of several filters the first that occurs.

    Confidence of multiple choice: softmax over the options' summed log-probs, at the most likely one, which `acc` grades.
    Of a generated answer: what it states ("confidence: 80%"), else the share of its repeats that agree with it. Raises
    UserError naming file, row and key for a row that holds neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the samples_TASK_DATE.jsonl of `lm_eval --log_samples`")
    answers: list[Answer] = []
    chosen, seen = None, set()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); give the .jsonl of `lm_eval --log_samples`") from error
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
            raise UserError(
                f"{place}: not JSON ({error}); give the .jsonl of --log_samples, not results.json"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: a sample is an object, not {type(row).__name__}")
        name = str(row.get("filter", UNREPEATED))
        chosen = chosen or name
        if name != chosen:
            continue
        answer = _answer(row, place)
        if answer.question_id in seen:
            raise UserError(
                f"{place}: `doc_id` {answer.question_id} occurs twice; give the samples of one task and run"
            )
        seen.add(answer.question_id)
        answers.append(answer)
    if not answers:
        raise UserError(f"{path}: no samples")
    return Measured(path.stem if chosen == UNREPEATED else f"{path.stem}, filter {chosen}", answers)


def choice_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Softmax over the options' summed log-probs (nats)."""
    values = np.array(logprobs, dtype=np.float64)
    weights = np.exp(values - values.max())
    return (weights / weights.sum()).tolist()


def _answer(row: Mapping[str, Any], place: str) -> Answer:
    _check_arguments(row, place)
    responses = _need(row, "filtered_resps", place, list)
    if not responses:
        raise UserError(f"{place}: `filtered_resps` is empty; no request was answered")
    chose = "acc" in row and isinstance(responses[0], list) and len(responses) > 1
    text, probability = _choice(row, responses, place) if chose else _generation(row, responses, place)
    return Answer(
        question_id=str(_need(row, "doc_id", place, int)),
        question=_question(row),
        text=text,
        # A sum over the options or repeats, so one number stands for the whole answer; log 0 has no JSON.
        token_logprobs=(math.log(max(probability, 1e-300)),),
        correct=_grade(row, "acc", place) if chose else _generation_grade(row, responses, place),
        accepted=(_accepted(row),),
    )


def _choice(row: Mapping[str, Any], responses: list[Any], place: str) -> tuple[str, float]:
    """The most likely option and its probability."""
    requests = _requests(row)
    if requests and len(requests) != len(responses):
        raise UserError(
            f"{place}: `arguments` holds {len(requests)} requests, `filtered_resps` {len(responses)} answers"
        )
    kept = list(range(len(responses)))
    if "acc_mutual_info" in row and requests:
        kept = [i for i in kept if requests[i][0] != ""]  # the others score the options without the question
    logprobs = [_logprob(responses[i], f"{place}: `filtered_resps[{i}]`") for i in kept]
    if len(logprobs) < 2:
        raise UserError(f"{place}: `filtered_resps` holds {len(logprobs)} option; only multiple choice can be read")
    if max(logprobs) == -math.inf:
        raise UserError(
            f"{place}: `filtered_resps` holds log-prob -inf for every option, so that none is the likeliest"
        )
    probabilities = choice_probabilities(logprobs)
    best = int(np.argmax(logprobs))
    options = [one[-1] for one in requests]
    if len(set(options)) == 1:  # as in winogrande, where the options stand in the prompts
        options = [one[0] for one in requests]
    return (options[kept[best]].strip() if options else f"option {best}"), probabilities[best]


def _generation(row: Mapping[str, Any], responses: list[Any], place: str) -> tuple[str, float]:
    """The generated answer and the confidence it states, or the share of its repeats that agree with it."""
    if len(responses) != 1 or "exact_match" not in row:
        raise UserError(
            f"{place}: neither multiple choice (`acc`, two or more options in `filtered_resps`) nor generation "
            "(`exact_match`, one request); other kinds of task cannot be read"
        )
    given = responses[0][0] if isinstance(responses[0], list) and responses[0] else responses[0]
    if not isinstance(given, str):
        raise UserError(f"{place}: `filtered_resps[0]` is no text but {type(given).__name__}")
    stated = read_statement(given)
    if stated.confidence is not None:
        return stated.answer, stated.confidence
    repeats = responses[0] if isinstance(responses[0], list) and len(responses[0]) > 1 else _repeats(row)
    agree = [normalize(str(one)) == normalize(given) for one in repeats]
    if len(repeats) < 2 or not any(agree):
        raise UserError(
            f"{place}: `resps` holds no confidence of a generated answer: it states none (`confidence: 80%`) and has no "
            "repeats to agree with it; set `repeats: 10` and `do_sample: true` in the task, with a filter that keeps all "
            "answers (no take_first), or measure with `calibtrain evaluate`"
        )
    return given, sum(agree) / len(agree)


def _generation_grade(row: Mapping[str, Any], responses: list[Any], place: str) -> bool:
    """Grade of a generated answer.

    Of repeats that are all kept the harness logs the share that match: then it is the first's own, told by comparing
    texts, if that finds the same share.
    """
    kept, share = responses[0], row["exact_match"]
    if not isinstance(kept, list) or len(kept) < 2 or share in (0, 1):
        return _grade(row, "exact_match", place)
    right = [normalize(read_statement(str(one)).answer) == normalize(str(row.get("target", ""))) for one in kept]
    if (
        not isinstance(share, int | float)
        or not 0 <= share <= 1
        or not math.isclose(sum(right) / len(right), share, abs_tol=1e-6)
    ):
        raise UserError(
            f"{place}: `exact_match` is {share!r} over {len(kept)} repeats, and comparing them with `target` does not tell "
            "which are right; log one answer as graded (take_first) with its repeats in `resps`"
        )
    return right[0]


def _repeats(row: Mapping[str, Any]) -> list[Any]:
    logged = row.get("resps")
    return logged[0] if isinstance(logged, list) and logged and isinstance(logged[0], list) else []


def _check_arguments(row: Mapping[str, Any], place: str) -> None:
    arguments = row.get("arguments") or []
    if not isinstance(arguments, Mapping | list):
        raise UserError(f"{place}: `arguments` is {short(arguments)}; it is a list of requests, or an object of them")
    entries = arguments.values() if isinstance(arguments, Mapping) else arguments
    for number, one in enumerate(entries):
        if not isinstance(one, Mapping | list):
            raise UserError(
                f"{place}: `arguments[{number}]` is {short(one)}; a request is a list of texts, or an object"
            )


def _requests(row: Mapping[str, Any]) -> list[list[str]]:
    """Texts of each request: newer harnesses log {"gen_args_0": {"arg_0": ..., "arg_1": ...}}, older ones lists."""
    arguments = row.get("arguments") or []
    entries = list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)
    texts = [list(one.values()) if isinstance(one, Mapping) else list(one) for one in entries]
    return [[part for part in one if isinstance(part, str)] or [""] for one in texts]


def _question(row: Mapping[str, Any]) -> str:
    """The document's own question, else the end of the prompt, which examples may stand before."""
    doc = row.get("doc")
    for key in QUESTION_KEYS:
        if isinstance(doc, Mapping) and isinstance(doc.get(key), str) and doc[key].strip():
            return str(doc[key]).strip()
    requests = _requests(row)
    return requests[0][0].strip().rsplit("\n\n", 1)[-1] if requests else ""


def _accepted(row: Mapping[str, Any]) -> str:
    """The target as text; a number among several options is the place of one."""
    target, requests = str(row.get("target", "")), _requests(row)
    if (
        target.isdecimal()
        and len(target) < 10
        and int(target) < len(requests)
        and len({one[-1] for one in requests}) > 1
    ):
        return requests[int(target)][-1].strip()
    return target


def _logprob(response: Any, place: str) -> float:
    """The log-prob of a logged [log-prob, is greedy]."""
    try:
        value = float(response[0] if isinstance(response, list) else response)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{place}: {response!r} is no [log-prob, is greedy]") from error
    if math.isnan(value) or value == math.inf:
        raise UserError(f"{place}: the log-prob {value} is no number to compare options by")
    return value


def _grade(row: Mapping[str, Any], key: str, place: str) -> bool:
    value = row[key]
    if isinstance(value, str) or value not in (0, 1):
        raise UserError(f"{place}: `{key}` is {value!r}, not 0 or 1; only answers that are right or wrong can be read")
    return bool(value)


def _need(row: Mapping[str, Any], key: str, place: str, kind: type) -> Any:
    if not isinstance(row.get(key), kind):
        found = "missing" if key not in row else f"a {type(row[key]).__name__}"
        raise UserError(f"{place}: `{key}` is {found}; give the .jsonl of `lm_eval --log_samples`")
    return row[key]

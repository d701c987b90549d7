"""How a policy answers: by the likelihood of its answers, by what it states behind them, and how far it went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RISK, DELTA = 0.2, 0.05
"""Of the certificate."""


def confidences(
    answers: Any, certifying: Any, loaded: Any, asked: Any, certified_by: Any, stated: bool
) -> dict[str, Any]:
    """Metrics by the likelihood of the answer, and by what it states where it does."""
    if not stated:
        both = [
            ([one.confidence for one in some], [bool(one.correct) for one in some]) for some in (answers, certifying)
        ]
        return metrics("likelihood", *both)
    read_as = [stated_answers(loaded, some, of) for some, of in ((answers, asked), (certifying, certified_by))]
    found: dict[str, Any] = {"stated_missing": float(np.mean([one["missing"] for one in read_as[0]]))}
    for kind in ("likelihood", "stated"):
        found |= metrics(kind, *[([one[kind] for one in some], [one["correct"] for one in some]) for some in read_as])
    found["stated_levels"] = len({one["stated"] for one in read_as[0]})
    return found


def stated_answers(loaded: Any, answers: Sequence[Any], records: Sequence[Any]) -> list[dict[str, Any]]:
    """What stands before the statement, graded, with its likelihood and the statement."""
    from calibtrain.confidence.stated import read_statement

    task = loaded.template.task
    said = [read_statement(one.said) for one in answers]
    grades = task.grades([task.read(one.answer, record) for one, record in zip(said, records, strict=True)], records)
    found = []
    for one, answer, grade in zip(said, answers, grades, strict=True):
        ends = np.cumsum([len(text) for text in answer.tokens])
        start = len("".join(answer.tokens)) - len(answer.said) + one.start if one.confidence is not None else math.inf
        likelihood = math.fsum(p for p, end in zip(answer.token_logprobs, ends, strict=True) if end <= start)
        stated = 0.5 if one.confidence is None else one.confidence  # who states nothing is as sure as not
        row = {"correct": bool(grade.correct), "stated": stated, "likelihood": math.exp(min(0.0, likelihood))}
        found.append({**row, "missing": one.confidence is None})
    return found


def head_beside(model: Path, loaded: Any) -> Any:
    """The confidence head of the run, if it has one."""
    from calibtrain.confidence.features import Fingerprint
    from calibtrain.confidence.head import FittedHead, has_head
    from calibtrain.pipeline.calibration_file import weights_hash

    if not has_head(model.parent):
        return None
    return FittedHead.load(model.parent, Fingerprint(weights_hash(model), loaded.template.hash))


def metrics(
    kind: str, test: tuple[list[float], list[bool]], certifying: tuple[list[float], list[bool]]
) -> dict[str, float]:
    """Accuracy, and by this confidence: its mean, calibration, order, and what share of the test answers is certified."""
    import torch

    from calibtrain.abstention.certificate import certify
    from calibtrain.calibration.metrics import summary as all_metrics
    from calibtrain.calibration.state import state_of

    confidence, correct = (torch.tensor(one) for one in test)
    every = all_metrics(state_of(confidence.double(), correct))
    certificate = certify(*certifying, RISK, DELTA).certificate
    coverage = 0.0 if certificate is None else float((confidence >= certificate.threshold).double().mean())
    return {
        "accuracy": every["acc"],
        f"{kind}_confidence": every["mean_conf"],
        f"{kind}_ece": every["ece_debiased"],
        f"{kind}_auroc": every["auroc"],
        f"{kind}_aurc": every["aurc"],
        f"{kind}_brier": every["brier"],
        f"{kind}_certified": coverage,
    }


def divergence(loaded: Any, begin: Any, records: Sequence[Any], seed: int) -> float:
    """KL of the policy to the model that it began with, in nats a reply: mean log ratio of one sampled reply a question."""
    from calibtrain.confidence.generation import generate, keep_none
    from calibtrain.data.encode import Encoded
    from calibtrain.losses.terms import ANSWER
    from calibtrain.training.reference import with_reference_logprobs

    template, settings = loaded.template, loaded.config.evaluation
    prompts = [template.prompt_ids(record) for record in records]
    replies = generate(
        loaded.model,
        prompts,
        stop_ids=template.stop_ids,
        goes_on=template.goes_on,
        pad_id=template.pad_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        samples=1,
        seed=seed,
        device=loaded.device,
        keep=keep_none,
    )
    sampled = [
        Encoded((*prompt, *one.tokens), len(prompt), ANSWER, place)
        for place, (prompt, (one,)) in enumerate(zip(prompts, replies, strict=True))
    ]
    sums = []
    for who in (loaded, begin):
        known = with_reference_logprobs(who.model.policy, sampled, template.pad_id)
        sums.append(np.array([sum(one.reference_logprobs) for one in known]))
    return float((sums[0] - sums[1]).mean())

"""What rows of `compare_matrix` say of a whole model, in plain words that follow from the tests, never from raw values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from calibtrain.spectral.null import TESTS

MOST, FEW = 0.5, 0.05
"""A claim holds of a model where at least MOST of its matrices are beyond chance, and of none where at most FEW are."""
ROUNDED = 0.25
"""From this share of the change on, rounding to the stored dtype is worth a sentence."""

Row = Mapping[str, Any]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and medians over the matrices that changed; relative drift and shares over all their elements."""
    changed = [row for row in rows if row["relative_drift"] > 0]
    weights = [row["relative_drift"] ** 2 * row["squared_norm"] for row in changed]
    total, start = math.fsum(weights), math.fsum(row["squared_norm"] for row in rows)

    def share(read: Any) -> float:
        return math.fsum(w * read(row) for w, row in zip(weights, changed, strict=True)) / total if total else 0.0

    return {
        "matrices": len(rows),
        "changed": len(changed),
        "relative_drift": math.sqrt(total / start) if start else 0.0,
        "rounding_share": _median([row["rounding_share"] for row in changed]),
        "shares": {
            name: share(lambda row, name=name: row["shares"][name]) for name in ("scale", "shared_rotation", "rest")
        },
        "tests": {
            name: {
                "tested": sum(not math.isnan(row["tests"][name]["p"]) for row in rows),
                "beyond": sum(row["tests"][name]["beyond"] for row in rows),
                "median": _median([row["tests"][name]["value"] for row in changed]),
                "chance": _median([_chance(row["tests"][name]) for row in changed]),
            }
            for name in TESTS
        },
        "alpha": _median([row["scale"]["alpha"] for row in changed]),
        "nf_ratio": _median([_ratio(row["consistency"]) for row in changed]),
        "kinds": dict(Counter(row["kind"] for row in rows)),
    }


def verdict_of(test: Mapping[str, Any]) -> str:
    """One entry of the summary's tests in words: beyond chance, in some matrices, chance, or not tested."""
    if not test["tested"]:
        return "not tested"
    share = test["beyond"] / test["tested"]
    return "beyond chance" if share >= MOST else "in some matrices" if share > FEW else "chance"


def findings(found: Mapping[str, Any], level: float) -> list[dict[str, Any]]:
    """What `summary` found, claim by claim: {"claim", "verdict", "beyond", "text"}."""
    tests = found["tests"]
    result = [_size(found)]
    for name, text in (
        ("scale", _scale_text(found)),
        ("uniform_scaling", _uniform_text(found)),
        ("shared_rotation", _rotation_text(found)),
    ):
        verdict = verdict_of(tests[name])
        beyond = tests[name]["beyond"] or "none"
        counted = f"{beyond} of {tests[name]['tested']} matrices stand out"
        alarms = f", of which at most {level:.0%} by luck on average" if tests[name]["beyond"] else ""
        lead = {
            "beyond chance": f"More than chance: {counted}{alarms}.",
            "in some matrices": f"More than chance in a part of the model: {counted}{alarms}.",
            "chance": f"No more than chance: {counted}{alarms}.",
            "not tested": "Not tested.",
        }[verdict]
        result.append(
            {"claim": name, "verdict": verdict, "beyond": verdict == "beyond chance", "text": f"{text} {lead}"}
        )
    return [*result, _meaning(found)]


def _size(found: Mapping[str, Any]) -> dict[str, Any]:
    rounding = found["rounding_share"]
    text = (
        f"{found['changed']} of {found['matrices']} matrices changed; all together by "
        f"{_percent(found['relative_drift'])} of their norm."
    )
    if rounding >= ROUNDED:
        text += (
            f" In half of them rounding to the stored number format may be {min(rounding, 1.0):.0%} or more of that change, "
            "and looks like noise; models stored in float32, or a checkpoint of the run (--step), show what is below."
        )
    return {"claim": "size", "verdict": "measured", "beyond": False, "text": text}


def _scale_text(found: Mapping[str, Any]) -> str:
    return f"Level of the singular values: in the median matrix they are {found['alpha']:.6f} times what they were."


def _uniform_text(found: Mapping[str, Any]) -> str:
    test = found["tests"]["uniform_scaling"]
    return (
        f"One factor for all singular values of a matrix explains {_percent(test['median'])} of how they changed; chance "
        f"explains {_percent(test['chance'])}."
    )


def _rotation_text(found: Mapping[str, Any]) -> str:
    test = found["tests"]["shared_rotation"]
    shared = max(0.0, 1 - test["median"] / test["chance"]) if test["chance"] else 0.0
    return (
        f"Left and right singular vectors: in the median matrix {_percent(shared)} of their turning is shared beyond what "
        f"any change of this size would share; NF is {found['nf_ratio']:.2f} times that of noise."
    )


def _meaning(found: Mapping[str, Any]) -> dict[str, Any]:
    shares = found["shares"]
    rotation = verdict_of(found["tests"]["shared_rotation"])
    if rotation == "beyond chance":
        text = (
            "The change respects how the model's singular directions belong together. A penalty that forgives such a change "
            "and charges the rest (polar_drift) lets training like this one pass."
        )
    elif rotation == "not tested":
        text = "Without draws of a null nothing is said of structure: raw angles and ratios look alike for any small change."
    else:
        text = (
            "The change does not follow the model's singular directions: what it turns, it mostly turns as noise of its "
            "size would. How far the weights went then says more about forgetting than which way; angle_budget limits that."
        )
    text += (
        f" Of the whole change one factor is {_percent(shares['scale'])}, a shared rotation at best "
        f"{_percent(shares['shared_rotation'])}, the rest {_percent(shares['rest'])}."
    )
    return {"claim": "forgetting", "verdict": rotation, "beyond": False, "text": text}


def _chance(test: Mapping[str, Any]) -> float:
    means = [null["mean"] for null in test["nulls"].values()]
    return sum(means) / len(means) if means else math.nan


def _ratio(consistency: Mapping[str, float]) -> float:
    return consistency["nf"] / consistency["null"] if consistency["null"] > 0 else math.nan


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return median(kept) if kept else math.nan


def _percent(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{100 * value:.0f}%" if value >= 0.095 else f"{100 * value:.2g}%"

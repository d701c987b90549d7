"""The tables and the summary of `rl_calibration.py`: means of an arm over its seeds, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from _report import print_table

SHARED = ("seconds", "cpu_seconds", "measuring", "answers_a_second", "n", "accuracy", "kl", "stated_missing")
KINDS = ("confidence", "ece", "auroc", "aurc", "brier", "certified")
MEASURES = (*SHARED, *(f"{who}_{kind}" for who in ("likelihood", "stated", "head") for kind in KINDS))


def mean_row(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of an arm over its seeds, with `_sd` beside each."""
    row: dict[str, Any] = {"arm": name, "seeds": len(found), "steps": found[0]["steps"] if found else 0}
    for key in MEASURES if found else ():
        values = np.array([one.get(key, math.nan) for one in found], dtype=float)
        row[key] = float(values.mean())
        row[f"{key}_sd"] = float(values.std(ddof=1)) if len(found) > 1 else math.nan
    return row


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """The arms by the likelihood, and by what else tells their confidence."""
    seeds = max(row["seeds"] for row in rows)
    cost = ("steps", "seconds", "answers_a_second")
    titles = {
        "likelihood": "the likelihood of the answer",
        "stated": "the stated confidence",
        "head": "the confidence head",
    }
    for who, title in titles.items():
        more = {"likelihood": cost, "stated": ("stated_missing",), "head": ()}[who]
        keys = ("accuracy", *(f"{who}_{kind}" for kind in KINDS), "kl", *more)
        shown = [row for row in rows if not math.isnan(row[f"{who}_ece"])]
        named = [{key.removeprefix(f"{who}_"): row[key] for key in keys} for row in shown]
        table = [{"arm": row["arm"], "seeds": row["seeds"], **one} for row, one in zip(shown, named, strict=True)]
        if table:
            print_table(f"{int(rows[0]['n'])} questions, by {title}; mean of up to {seeds} seeds", table)


COMPARED = {
    "ece_plain_rl": ("rl_accuracy", "likelihood_ece"),
    "ece_calibrated_rl": ("rl_log", "likelihood_ece"),
    "ece_stated_rl": ("rl_stated", "stated_ece"),
    "ece_head_rl": ("rl_head", "head_ece"),
    "auroc_head_rl": ("rl_head", "head_auroc"),
    "ece_dpo": ("dpo", "likelihood_ece"),
    "ece_dpo_calibrated": ("dpo_scored", "likelihood_ece"),
    "ece_ppo_reward_model": ("ppo_reward_model", "likelihood_ece"),
    "ece_ppo_reward_model_calibrated": ("ppo_reward_model_scored", "likelihood_ece"),
    "ece_ppo_held": ("ppo_held", "likelihood_ece"),
    "ece_ppo_stated": ("ppo_stated", "stated_ece"),
    "ece_ppo_m": ("ppo_m", "stated_ece"),
    "ece_ppo_c": ("ppo_c", "stated_ece"),
    "ece_ppo_c_proper": ("ppo_c_proper", "stated_ece"),
}
DELTAS = {"accuracy_delta": "accuracy", "auroc_delta": "likelihood_auroc"}


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds with `_sd`; the deltas are rl_log less rl_accuracy, on the same questions of each seed."""
    named = {one["arm"] for one in found}
    by_arm = {name: {one["seed"]: one for one in found if one["arm"] == name} for name in named}
    values = {key: [one[measure] for one in by_arm.get(name, {}).values()] for key, (name, measure) in COMPARED.items()}
    plain, ours = by_arm.get("rl_accuracy", {}), by_arm.get("rl_log", {})
    for key, measure in DELTAS.items():
        values[key] = [ours[seed][measure] - plain[seed][measure] for seed in sorted(plain.keys() & ours.keys())]
    result: dict[str, float] = {"seeds": max((len(some) for some in values.values()), default=0)}
    for key, some in values.items():
        if some:
            result[key] = float(np.mean(some))
        if len(some) > 1:
            result[f"{key}_sd"] = float(np.std(some, ddof=1))
    return result

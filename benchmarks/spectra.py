"""Is the picture of post-training as scaling and shared rotation (He, Cao 2025, arXiv 2509.17866) more than chance here?

SmolLM2-135M is fine-tuned on 400 facts in several ways. Every matrix is compared with where it began, against null models;
then parts of the change are undone (`--write-without`) and the model is asked again: what carries the skill, what acts on
confidence, what forgets. Beside each stands a control: a model with noise of the same size, a random part of the change
undone or kept that is as large, and the whole change shrunk to that size.

    pip install --no-deps gensim==4.4.0
    python benchmarks/spectra.py --work runs/spectra --json benchmarks/results/spectra.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _questions import SEEDS, keep_apart
from _report import print_table, write_json
from _spectra_runs import (
    ARMS,
    BASE,
    INTERVENTIONS,
    SFT,
    SMOKE,
    intervened,
    log_odds,
    measure,
    noised,
    paired,
    quality,
    start,
    train,
)

STRUCTURE = ("sft", "orpo", "calibrated_orpo", "sft_far", "sft_fp32", "noise")
"""Runs whose change is held against its nulls."""
CAUSAL = ("sft", "sft_far")
"""Runs whose change is taken apart and undone."""
PENALTIES = ("sft", "polar_drift", "angle_budget")
SIDES = (256, 384, 576, 768, 1024, 1536)


def main() -> None:
    """Train, compare, undo, ask, and hold the claims against their nulls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keeps models and measurements; what is there is not repeated")
    parser.add_argument("--seeds", type=int, default=2, choices=range(1, SEEDS + 1))
    parser.add_argument("--only", help="comma-separated runs, e.g. sft,orpo")
    parser.add_argument("--smoke", action="store_true", help="two steps, 16 questions, one seed, layers 0 and 1")
    parser.add_argument("--override", action="append", default=[], help="changes to the config of every run")
    arguments = parser.parse_args()
    overrides = [*(SMOKE if arguments.smoke else []), *arguments.override]
    seeds = list(range(1 if arguments.smoke else arguments.seeds))
    arms = [arm for arm in ARMS if not arguments.only or arm in arguments.only.split(",")]
    limit, layers = (4, ["--layers", "0-1"]) if arguments.smoke else (None, [])
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        keep_apart(work, [*BASE, SFT, *overrides])
        base = start(work, overrides)
        models = {(arm, seed): train(work, arm, seed, overrides) for seed in seeds for arm in arms}
        models |= {
            ("noise", seed): noised(work, base, models["sft", seed], f"noise-{seed}") for seed in seeds if "sft" in arms
        }
        spectra = {
            key: compared(work, base, model, f"{key[0]}-{key[1]}", layers)
            for key, model in models.items()
            if key[0] in STRUCTURE
        }
        raw = measure(work, "raw", None, overrides, limit)
        asked = {
            key: measure(work, f"{key[0]}-{key[1]}", model, overrides, limit)
            for key, model in models.items()
            if key[0] in CAUSAL + PENALTIES
        }
        undone = {
            (arm, seed, name): measure(
                work,
                f"{arm}-{seed}-{name}",
                intervened(work, base, models[arm, seed], name, f"{arm}-{seed}"),
                overrides,
                limit,
            )
            for arm, seed in models
            if arm in CAUSAL
            for name in INTERVENTIONS
        }
    shown = [arm for arm in STRUCTURE if (arm, seeds[0]) in spectra]
    structure = [structure_row(arm, [spectra[arm, seed] for seed in seeds]) for arm in shown]
    causal = [{"arm": "raw", "model": "raw", **quality(raw, raw)}]
    for arm in [arm for arm in CAUSAL if arm in arms]:
        causal.append({"arm": arm, "model": "tuned", **mean([quality(asked[arm, seed], raw) for seed in seeds])})
        for name in INTERVENTIONS:
            causal.append(
                {"arm": arm, "model": name, **mean([quality(undone[arm, seed, name], raw) for seed in seeds])}
            )
    claims = [row for arm in CAUSAL if arm in arms for row in claim_rows(arm, seeds, spectra, asked, undone)]
    penalties = [
        {"arm": arm, **mean([quality(asked[arm, seed], raw) for seed in seeds])} for arm in PENALTIES if arm in arms
    ]
    sizes = growth((64, 96, 128) if arguments.smoke else SIDES)
    print_table("what changed, median matrix, mean over seeds", structure)
    print_table("claims", claims)
    print_table("parts undone, mean over seeds", causal)
    print_table("penalties", penalties)
    print_table("one matrix, one core", sizes["rows"])
    result = summary(claims, causal, spectra, arms, sizes)
    print(json.dumps(result, indent=2))
    if arguments.json:
        parts = {
            "structure": structure,
            "claim": claims,
            "intervention": causal,
            "penalty": penalties,
            "growth": sizes["rows"],
        }
        write_json(arguments.json, [{"part": part, **row} for part, rows in parts.items() for row in rows], result)


def compared(work: Path, base: Path, tuned: Path, name: str, layers: Sequence[str]) -> dict[str, Any]:
    """spectra.json of a pair, by the command in a process of its own, so that its memory is its own too."""
    output = work / f"spectra-{name}"
    if not (output / "spectra.json").is_file():
        command = [
            sys.executable,
            "-m",
            "calibtrain.cli",
            "spectra",
            str(base),
            str(tuned),
            "--output",
            str(output),
            *layers,
        ]
        subprocess.run(command, check=True)
    return dict(json.loads((output / "spectra.json").read_text()))


def structure_row(arm: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over matrices, means over seeds."""
    summaries = [one["summary"] for one in found]
    row: dict[str, Any] = {
        "arm": arm,
        "matrices": summaries[0]["matrices"],
        "relative_drift": float(np.mean([one["relative_drift"] for one in summaries])),
        "rounding": float(np.mean([one["rounding_share"] for one in summaries])),
        "alpha_minus_1": float(np.mean([one["alpha"] - 1 for one in summaries])),
        "nf_of_null": float(np.mean([one["nf_ratio"] for one in summaries])),
    }
    for name in ("scale", "uniform_scaling", "shared_rotation"):
        tests = [one["tests"][name] for one in summaries]
        row[f"{name}_beyond"] = float(np.mean([one["beyond"] / max(1, one["tested"]) for one in tests]))
        if name != "scale":
            row[f"{name}_value"] = float(np.mean([one["median"] for one in tests]))
            row[f"{name}_chance"] = float(np.mean([one["chance"] for one in tests]))
    return row


def claim_rows(arm: str, seeds: Sequence[int], spectra: Any, asked: Any, undone: Any) -> list[dict[str, Any]]:
    """The paper's claims on one way of training: measured value, interval of its null, verdict."""
    tests = [spectra[arm, seed]["summary"]["tests"] for seed in seeds]
    rows = []
    for claim, name in (("uniform scaling", "uniform_scaling"), ("shared rotation", "shared_rotation")):
        intervals = [
            null
            for seed in seeds
            for matrix in spectra[arm, seed]["matrices"]
            for null in matrix["tests"][name]["nulls"].values()
        ]
        share = float(np.mean([one[name]["beyond"] / max(1, one[name]["tested"]) for one in tests]))
        rows.append(
            {
                "arm": arm,
                "claim": claim,
                "value": float(np.mean([one[name]["median"] for one in tests])),
                "null_low": float(np.median([one["low"] for one in intervals])),
                "null_high": float(np.median([one["high"] for one in intervals])),
                "matrices_beyond": share,
                "beyond": share >= 0.5,
            }
        )

    def joined(found: Any, key: str, name: str | None = None) -> Any:
        return np.concatenate([found[(arm, seed, name) if name else (arm, seed)][key] for seed in seeds])

    # Undoing the rotation must cost more right answers than undoing a random part as large does.
    value, low, high = paired(
        joined(undone, "correct", "random part undone"), joined(undone, "correct", "without rotation")
    )
    rows.append(_claim(arm, "rotation carries the skill", value, low, high, beyond=low > 0))
    value, low, high = paired(
        joined(undone, "correct", "without residual"), joined(undone, "correct", "random part kept")
    )
    rows.append(_claim(arm, "scale and rotation keep the skill", value, low, high, beyond=low > 0))
    # A temperature multiplies every answer's log-odds: their mean size, before and after the scale is undone. Noise as
    # large, which rounds the weights anew as well, moves it by as much as chance does.
    sizes = [np.abs(log_odds(joined(asked, "confidence")))]
    sizes += [np.abs(log_odds(joined(undone, "confidence", name))) for name in INTERVENTIONS[:2]]
    value, (_, low, high) = paired(sizes[0], sizes[1])[0], paired(sizes[0], sizes[2])
    reach = max(abs(low), abs(high))
    rows.append(
        _claim(arm, "scale acts as a temperature", value, value - reach, value + reach, beyond=abs(value) > reach)
    )
    return rows


def _claim(arm: str, claim: str, value: float, low: float, high: float, *, beyond: bool) -> dict[str, Any]:
    """A difference whose null is 0: the interval is shown around 0."""
    return {
        "arm": arm,
        "claim": claim,
        "value": value,
        "null_low": low - value,
        "null_high": high - value,
        "matrices_beyond": math.nan,
        "beyond": beyond,
    }


def growth(sides: Sequence[int]) -> dict[str, Any]:
    """Seconds of one square matrix on one core by its side, and the fitted power; full SVD and top 256."""
    import torch

    from calibtrain.spectral import Settings
    from calibtrain.spectral.compare import compare_matrix

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for side in sides:
        draw = torch.Generator().manual_seed(side)
        base = torch.randn(side, side, generator=draw).bfloat16()
        tuned = (base.float() + 0.01 * torch.randn(side, side, generator=draw)).bfloat16()
        row: dict[str, Any] = {"side": side}
        for name, rank in (("full", None), ("top", min(256, side // 2))):
            began = time.perf_counter()
            compare_matrix("w", base, tuned, Settings(rank=rank))
            row[name] = time.perf_counter() - began
        rows.append(row)
    torch.set_num_threads(before)
    large = [row for row in rows if row["side"] >= sides[len(sides) // 2 - 1]]
    fits = {
        name: np.polyfit(np.log([row["side"] for row in large]), np.log([row[name] for row in large]), 1)
        for name in ("full", "top")
    }
    return {"rows": rows, "fits": {name: (float(power), float(math.exp(at))) for name, (power, at) in fits.items()}}


SHAPES = {
    "8B": (32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3),
    "70B": (80, [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 3),
}
"""Layers of Llama 3 and the matrices of one."""


def planned(name: str, power: float, factor: float) -> float:
    """Core hours of a model by the fit: a matrix (m, n) counts as m / n squares of its shorter side n."""
    layers, shapes = SHAPES[name]
    return layers * sum(factor * min(s) ** power * max(s) / min(s) for s in shapes) / 3600


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key by key."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def summary(
    claims: Sequence[dict[str, Any]], causal: Sequence[dict[str, Any]], spectra: Any, arms: Sequence[str], sizes: Any
) -> dict[str, Any]:
    """How many claims hold beyond chance, what the skill needs, and what it costs to tell."""
    found = {(row["arm"], row["model"]): row for row in causal}
    timed = spectra[next(iter(spectra))]
    result: dict[str, Any] = {
        "claims_tested": len(claims),
        "claims_beyond_null": sum(bool(row["beyond"]) for row in claims),
        "seconds_135m": timed["seconds"],
        "peak_gb": timed["peak_gb"],
    }
    kept = [
        (found[arm, "without residual"]["accuracy"] - found["raw", "raw"]["accuracy"])
        / (found[arm, "tuned"]["accuracy"] - found["raw", "raw"]["accuracy"])
        for arm in CAUSAL
        if arm in arms
    ]
    result["skill_kept_by_scale_and_rotation"] = float(np.mean(kept)) if kept else math.nan
    noise = [one["summary"]["tests"] for (arm, _), one in spectra.items() if arm == "noise"]
    result["noise_called_structure"] = float(
        np.mean([one["beyond"] / max(1, one["tested"]) for tests in noise for one in tests.values()] or [math.nan])
    )
    for name, (power, factor) in sizes["fits"].items():
        result[f"power_{name}"] = power
        for model in SHAPES:
            result[f"core_hours_{model}_{name}"] = planned(model, power, factor)
    return result


if __name__ == "__main__":
    main()

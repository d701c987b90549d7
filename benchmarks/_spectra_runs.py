"""Runs of `benchmarks/spectra.py`: training, interventions on the weights, and what each model knows and has forgotten."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _questions import asked_of_all
from forgetting import BASE as FORGETTING
from forgetting import text_nats

BASE = [
    *FORGETTING,
    "data.splits={train: 400, calibration: 384, temperature: 0, certification: 0, test: 1000}",
]
SMOKE = ["training.max_steps=2", "data.splits={train: 16, calibration: 8, temperature: 0, certification: 0, test: 16}"]


def held(name: str, weight: float) -> str:
    """Override that adds a weight penalty."""
    every = {"name": name, "weight": weight, "probes": 64, "layer_fraction": 0.25}
    return f"weight_penalties=[{json.dumps(every)}]"


SFT, ORPO = "objective={name: sft}", "objective={name: orpo, beta: 0.5}"
ARMS: dict[str, list[str]] = {
    "sft": [SFT],
    "orpo": [ORPO],
    "calibrated_orpo": [ORPO, "penalties=[{name: answer_score, moves: all}]"],
    "sft_far": [SFT, "training.epochs=4", "training.learning_rate=2.0e-4"],
    "sft_fp32": [SFT, "model.dtype=fp32"],
    "polar_drift": [SFT, held("polar_drift", 3000.0)],
    "angle_budget": [SFT, held("angle_budget", 300.0)],
}
"""`sft_far`: four times the rate and twice the steps. `sft_fp32`: no rounding of the exported weights."""


def train(work: Path, arm: str, seed: int, overrides: Sequence[str]) -> Path:
    """The run's model directory; trained unless it is there."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import train as pipeline

    output = work / f"run-{arm}-{seed}"
    if not (output / "model" / "config.json").is_file():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
        pipeline.run(load_config("demo", [f"seed={seed}", f"output_dir={output}", *BASE, *ARMS[arm], *overrides]))
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return output / "model"


def start(work: Path, overrides: Sequence[str]) -> Path:
    """The raw model's directory."""
    from calibtrain.config_file import load_config
    from calibtrain.models.loading import local_path

    return Path(local_path(load_config("demo", [f"output_dir={work}", *overrides]).model.source))


def noised(work: Path, base: Path, like: Path, name: str) -> Path:
    """The raw model plus Gaussian noise as large, matrix by matrix, as the change to `like`: the control."""
    import torch

    from calibtrain.spectral.written_models import write_model

    def change(pair: Any, initial: Any, weight: Any) -> Any:
        draw = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
        noise = torch.randn(initial.shape, generator=draw, dtype=torch.float64)
        size = (weight.double() - initial.double()).norm() / noise.norm()
        return initial.double() + noise * size

    if not (work / name / "config.json").is_file():
        write_model(base, like, work / name, change)
    return work / name


INTERVENTIONS = (
    "without scale",
    "noise as large as the scale",
    "without rotation",
    "random rotation",
    "random part undone",
    "without residual",
    "random part kept",
    "change shrunk",
)
"""Controls: noise, of "without scale"; "random part undone", of "without rotation"; the last two, of "without residual"."""


def intervened(work: Path, base: Path, tuned: Path, name: str, label: str) -> Path:
    """TUNED with one part of its change undone, as a directory under `work`."""
    from calibtrain.pipeline.spectra import sides, write_without
    from calibtrain.spectral.written_models import write_model

    target = work / f"{label}-{name.replace(' ', '_')}"
    if (target / "config.json").is_file():
        return target
    if name in CONTROLS:
        write_model(base, tuned, target, CONTROLS[name])
    elif name == "random rotation":
        write_without(sides(str(base), tuned), "rotation", target, random_rotation=0)
    else:
        write_without(sides(str(base), tuned), name.removeprefix("without "), target)
    return target


def _part(pair: Any, initial: Any, weight: Any) -> Any:
    """A part of W - W0 as large as its shared rotation, taken in bases that know nothing of W0's.

    The shared rotation takes what is symmetric off the diagonal of U0^T (W - W0) V0; here U0 and V0 are turned at random,
    U0 within the columns of W0 (rows, where those are fewer), so that what lies outside of them stays outside.
    """
    import torch

    from calibtrain.spectral.split import bases_of, upright

    change, first = upright(weight.double() - initial.double()), bases_of(upright(initial.double()))
    draw = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
    left, right = (
        side @ torch.linalg.qr(torch.randn(first.rank, first.rank, generator=draw, dtype=torch.float64)).Q
        for side in (first.left, first.right)
    )
    inner = left.mT @ change @ right
    symmetric = (inner + inner.mT) / 2
    symmetric.diagonal().zero_()
    part = left @ symmetric @ right.mT
    return part if initial.shape[0] >= initial.shape[1] else part.mT


def _shrunk(pair: Any, initial: Any, weight: Any) -> Any:
    """W0 + t (W - W0), as far from W0 as scale and shared rotation alone go."""
    from calibtrain.spectral.split import without

    change = weight.double() - initial.double()
    structured = without("residual", initial, weight) - initial.double()
    return initial.double() + change * (structured.norm() / change.norm().clamp(min=1e-300))


def _as_scale(pair: Any, initial: Any, weight: Any) -> Any:
    """W and noise as large as what undoing the scale takes away: the weights are rounded anew, as they are there."""
    import torch

    from calibtrain.spectral.split import without

    taken = (without("scale", initial, weight) - weight.double()).norm()
    draw = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
    noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
    return weight.double() + noise * (taken / noise.norm())


CONTROLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "noise as large as the scale": _as_scale,
    "random part undone": lambda pair, initial, weight: weight.double() - _part(pair, initial, weight),
    "random part kept": lambda pair, initial, weight: initial.double() + _part(pair, initial, weight),
    "change shrunk": _shrunk,
}


def measure(work: Path, name: str, model: Path | None, overrides: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Test questions right or wrong with their confidence, and nats of the news items; kept under `work`."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.evaluate import Loaded

    file = work / f"measured-{name.replace(' ', '_')}.json"
    if not file.is_file():
        config = load_config("demo", [f"output_dir={work / 'fixed'}", *BASE, SFT, *overrides])
        (splits, shots), loaded = asked_of_all([*BASE, SFT, *overrides]), Loaded(config, model)
        found = loaded.measure(splits["test"], shots if model is None else ())
        nats, tokens = text_nats(loaded.model.policy.causal_model, loaded.template.tokenizer, limit)
        kept = {
            "correct": found.correct.tolist(),
            "confidence": found.confidence.tolist(),
            "nats": nats,
            "tokens": tokens,
        }
        file.write_text(json.dumps(kept))
    return {key: np.array(value, dtype=float) for key, value in json.loads(file.read_text()).items()}


def quality(found: dict[str, Any], raw: dict[str, Any]) -> dict[str, float]:
    """Accuracy, mean confidence, debiased ECE, AUROC, and nats a token that the news became worse by."""
    from calibtrain.pipeline.evaluate import measured_metrics

    metrics = measured_metrics(found["confidence"], found["correct"].astype(bool))
    return {
        "accuracy": float(found["correct"].mean()),
        "mean_confidence": float(found["confidence"].mean()),
        "ece_debiased": metrics["ece_debiased"],
        "auroc": metrics["auroc"],
        "forgetting": float((found["nats"] - raw["nats"]).sum() / raw["tokens"].sum()),
    }


def paired(first: Any, second: Any, replicates: int = 2000) -> tuple[float, float, float]:
    """Mean of `first` - `second` (questions,) with its 95 % bootstrap interval."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(difference), (replicates, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def log_odds(confidence: Any) -> Any:
    """Log q / (1 - q), within what float32 likelihoods tell apart."""
    q = np.clip(confidence, 1e-6, 1 - 1e-6)
    return np.log(q) - np.log1p(-q)

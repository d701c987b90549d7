"""The auxiliary network: the chance that a proposed answer is right, read off the model's hidden states.

A linear or a small multilayer probe on one layer at one position (Azaria and Mitchell 2023, arXiv 2304.13734; Kossen et
al. 2024, arXiv 2406.15927, for the positions), both chosen on answers that the probe was not fitted to.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration.scores import grades_of, log_loss, sigmoid
from calibtrain.confidence.features import POSITIONS, Features, Fingerprint, check_fingerprint
from calibtrain.errors import UserError
from calibtrain.records import unit_hash

Array = NDArray[np.float64]
Kind = Literal["linear", "mlp"]
KINDS: tuple[Kind, ...] = ("linear", "mlp")

STRENGTHS = {"linear": (1e-4, 1e-3, 1e-2, 1e-1), "mlp": (1e-2, 1.0)}
"""Regularisation to choose from: scikit-learn's C of the logistic regression, AdamW's weight decay of the MLP."""

WIDTH, LEARNING_RATE, BATCH, EPOCHS, PATIENCE = 32, 1e-3, 64, 100, 5

SHARES = {"fit": 0.6, "stop": 0.15, "choose": 0.25}
"""Shares of the questions: to fit, to stop the MLP (a linear probe fits on them too), and to choose by."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer, position and strength, with its mean log loss in nats on the answers that choose."""

    layer: int
    position: str
    strength: float
    log_loss: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A fitted probe. `weights` are float32: mean and scale (H,) of its inputs, then the network's matrices and biases."""

    kind: Kind
    layer: int
    position: str
    weights: dict[str, NDArray[np.float32]]
    candidates: tuple[Candidate, ...]  # all that were compared, best first
    n: int  # answers that took part in fitting, stopping or choosing
    seed: int
    fingerprint: Fingerprint

    def score(self, features: Features) -> Array:
        """Probability of being right (N,) float64. UserError for other weights, template, layers or width."""
        check_fingerprint("probe", self.fingerprint, features.fingerprint)
        states = features.at(self.layer, self.position)
        if states.shape[1] != self.weights["mean"].shape[0]:
            width = self.weights["mean"].shape[0]
            raise UserError(f"probe: reads hidden states of width {width}, given {states.shape[1]}")
        return sigmoid(_logit(self.weights, states))

    def save(self, folder: Path) -> None:
        """Write probe.safetensors and probe.json."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "probe.safetensors.partial"
        save_file({name: np.ascontiguousarray(value) for name, value in self.weights.items()}, partial)
        os.replace(partial, folder / "probe.safetensors")
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weights"}
        facts |= {"candidates": [asdict(one) for one in self.candidates], "fingerprint": asdict(self.fingerprint)}
        partial = folder / "probe.json.partial"
        partial.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(partial, folder / "probe.json")

    @classmethod
    def load(cls, folder: Path, fingerprint: Fingerprint) -> Probe:
        """Probe of a folder; UserError when there is none, or it was fitted to other weights or template."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            facts = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
            fitted = Fingerprint(**facts.pop("fingerprint"))
            candidates = tuple(Candidate(**one) for one in facts.pop("candidates"))
            weights = load_file(folder / "probe.safetensors")
            probe = cls(**facts, candidates=candidates, weights=weights, fingerprint=fitted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder}: no probe that can be read ({error}); run `calibtrain probe`") from error
        check_fingerprint(f"{folder}: probe", fitted, fingerprint)
        return probe


def cost(features: Features) -> dict[str, float]:
    """Extra cost of a probe's score, mean of an answer: forward passes, and tokens that they read."""
    return {
        "forward_passes": float(features.forward_passes),
        "tokens": float(features.forward_passes * features.tokens.mean()),
    }


def fit_probe(
    features: Features,
    correct: ArrayLike,
    question_ids: Sequence[str],
    *,
    kind: Kind = "linear",
    layers: Sequence[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    seed: int = 0,
) -> Probe:
    """Fit a probe of graded answers; report it on others.

    correct (N,) bool or 0/1; question_ids (N,) decide who fits, stops and chooses, so that answers to one question stay
    together. Layer, position and strength have the lowest log loss on the choosing part; the chosen probe is then fitted
    once more on all but the stopping part. The same seed gives the same probe. Raises UserError for an unknown kind, and
    where a part lacks right or wrong answers.
    """
    if kind not in KINDS:
        raise UserError(f"probe kind: {kind!r} is none of {', '.join(KINDS)}")
    grades = grades_of(correct, len(features))
    if len(question_ids) != len(features):
        raise UserError(f"probe: {len(features)} answers, {len(question_ids)} question ids; they must be equally many")
    part = np.array([_part(question_id, seed) for question_id in question_ids])
    fit, stop, choose = part == "fit", part == "stop", part == "choose"
    for name, rows in (("fit", fit), ("stop", stop), ("choose", choose)):
        if len(np.unique(grades[rows])) < 2:
            raise UserError(
                f"probe: the part of the answers to {name} by has {int(rows.sum())} answers and not both right and wrong "
                "ones; give more questions"
            )
    candidates = []
    for layer in layers or features.layers:
        for position in positions:
            states = features.at(layer, position)
            for strength in STRENGTHS[kind]:
                weights = _fit(kind, states, grades, fit, stop, strength, seed)
                loss = log_loss(sigmoid(_logit(weights, states[choose])), grades[choose])
                candidates.append(Candidate(layer, position, strength, loss))
    ranked = tuple(sorted(candidates, key=lambda one: one.log_loss))
    best = ranked[0]
    states = features.at(best.layer, best.position)
    weights = _fit(kind, states, grades, fit | choose, stop, best.strength, seed)
    return Probe(kind, best.layer, best.position, weights, ranked, len(grades), seed, features.fingerprint)


def _part(question_id: str, seed: int) -> str:
    place = unit_hash("probe", seed, question_id)
    return "fit" if place < SHARES["fit"] else "stop" if place < SHARES["fit"] + SHARES["stop"] else "choose"


def _fit(
    kind: Kind,
    states: NDArray[np.float32],
    grades: Array,
    fit: NDArray[np.bool_],
    stop: NDArray[np.bool_],
    strength: float,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """Weights of a probe fitted on `fit`; a linear one also on `stop`, since it needs no stopping."""
    rows = fit | stop if kind == "linear" else fit
    inputs = states[rows].astype(np.float64)
    mean, scale = inputs.mean(0), inputs.std(0)
    scale[scale < 1e-6 * max(1.0, float(scale.max()))] = 1.0  # a constant feature says nothing, at any size
    standard = {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}
    if kind == "linear":
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a fit that is not done yet is chosen only where it is best
            model = LogisticRegression(C=strength, max_iter=500).fit((inputs - mean) / scale, grades[rows])
        return {**standard, "0.weight": model.coef_.astype(np.float32), "0.bias": model.intercept_.astype(np.float32)}
    z = torch.from_numpy(((states - standard["mean"]) / standard["scale"]).astype(np.float32))
    return {**standard, **_fit_mlp(z, torch.from_numpy(grades).float(), fit, stop, strength, seed)}


def _fit_mlp(
    z: torch.Tensor,
    y: torch.Tensor,
    fit: NDArray[np.bool_],
    stop: NDArray[np.bool_],
    weight_decay: float,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """One hidden layer, AdamW on the log loss; the epoch with the lowest log loss on `stop` is kept."""
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(z.shape[1], WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
        rows, held = torch.from_numpy(np.flatnonzero(fit)), torch.from_numpy(stop)
        best, kept, waited = float("inf"), network.state_dict(), 0
        for _ in range(EPOCHS):
            for batch in rows[torch.randperm(len(rows))].split(BATCH):
                optimizer.zero_grad()
                loss_of(network(z[batch])[:, 0], y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = loss_of(network(z[held])[:, 0], y[held]).item()
            if loss < best:
                best, waited = loss, 0
                kept = {name: value.detach().clone() for name, value in network.state_dict().items()}
            elif (waited := waited + 1) >= PATIENCE:
                break
    return {name: value.numpy() for name, value in kept.items()}


def _logit(weights: dict[str, NDArray[np.float32]], states: NDArray[Any]) -> Array:
    """Log-odds (N,) float64 of standardised states through the network: linear, or linear, ReLU, linear."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    x = (states.astype(np.float64) - wide["mean"]) / wide["scale"]
    x = x @ wide["0.weight"].T + wide["0.bias"]
    if "2.weight" in wide:
        x = np.maximum(x, 0.0) @ wide["2.weight"].T + wide["2.bias"]
    return np.asarray(x[:, 0], dtype=np.float64)

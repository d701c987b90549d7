"""The confidence head as an artefact: solved for on graded answers, kept beside the model, and read at answering.

It is `calibtrain.models.confidence_head` in numbers. Solving: a logistic regression whose slope on the likelihood's log-odds
and whose bias are free, and whose other weights are held towards 0 by a penalty that cross-validation chooses. Infinite
strength, which is Platt's map of the likelihood, stays unless another is better beyond chance: the head is not to be worse.

Nor on questions unlike those that it was solved on, of which it knows nothing: half of these tell whether a question's last
state is like theirs (calibtrain.confidence.outside, calibrated on the other half), and where it is not, Platt's map stands
in its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration.scores import grades_of, logit, sigmoid
from calibtrain.confidence.answered import Answered
from calibtrain.confidence.features import Fingerprint, check_fingerprint
from calibtrain.confidence.outside import ALPHA, Outside, fit_outside
from calibtrain.confidence.source import Array, Cost, SourceScores
from calibtrain.errors import UserError
from calibtrain.models.confidence_head import POSITIONS, READINGS, log_odds, normalized

logger = logging.getLogger(__name__)

FOLDS = 5
FEWEST = 2 * FOLDS
"""Right and wrong answers without which nothing is solved for."""
STRENGTHS = (np.inf, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
"""Of the penalty on the mean log loss, strongest first; weaker ones are tried until LATER of them are no better."""
LATER = 2
MOST_DIRECTIONS = 512
"""Of the states, by variance, that weights are solved for. With 4,096 answers of the demo's model and 768 directions AUROC
rose by .001, with 128 it fell by .003."""
NEWTON_STEPS, CLOSE = 30, 1e-9
"""At most so many, until the loss falls by less than this."""
FORESEEN = 1e-6
"""Of the loss: a first step that should gain more and gains nothing is told."""
RIDGE = 1e-9
"""On slope and bias, which are free, so that their curvature can be inverted where all answers are sure."""
LEAST_FOR_STATES = 256
"""Graded answers below which the likelihood stays alone. Of ten draws of 64 (128) answers of the demo's model, a penalty
chosen on so few took .064 (.013) of AUROC at worst and gave nothing on average; of 256, none lost any."""
BEYOND_CHANCE = 0.5
"""Standard errors of their paired difference by which the best must beat the likelihood in cross-validation."""
FOLDER, STEM, OUTSIDE = "confidence_head", "head", "outside.safetensors"


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What the head reads of N answers, float32 or wider."""

    logprob: NDArray[np.float64]  # (N,) of the whole answer
    readings: NDArray[np.floating[Any]]  # (N, READINGS)
    states: NDArray[np.floating[Any]]  # (N, layers, POSITIONS, H)

    @classmethod
    def of(cls, answered: Answered) -> HeadInputs:
        """UserError where the answers came without their states, as those of a server do."""
        if answered.states is None or answered.readings is None:
            raise UserError("confidence head: reads hidden states, and whoever answered gives none (a server, say)")
        logprob = np.array([answer.logprob for answer in answered.answers], dtype=np.float64)
        return cls(logprob, answered.readings.numpy(), answered.states.numpy())

    def __len__(self) -> int:
        return len(self.logprob)


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head's numbers and where they are from. `weights` are float32: slope and bias (1,), readings (R,), states."""

    layers: tuple[int, ...]
    weights: dict[str, NDArray[np.float32]]  # "states" is (layers, POSITIONS, H); "plain" (2,) slope and bias alone
    how: str  # "solved" after the last step, or "trained" along the run
    n: int  # graded answers that it was solved on; 0 where it was trained
    strength: float | None  # None: infinite, the likelihood alone, or trained
    losses: tuple[
        tuple[float | None, float, float], ...
    ]  # strength, cross-validated log loss, its error to the first's
    fingerprint: Fingerprint
    outside: Outside | None = None  # tells questions unlike those that it was solved on

    @property
    def mark(self) -> str:
        """Of these very numbers, for a file's name."""
        digest = hashlib.sha256(b"".join(self.weights[name].tobytes() for name in sorted(self.weights)))
        if self.outside is not None:
            digest.update(self.outside.mean.tobytes() + self.outside.held_out.tobytes())
        return digest.hexdigest()[:16]

    @property
    def gain(self) -> float:
        """Standard errors by which its cross-validated loss lies below that of the likelihood alone; 0 where it is that."""
        found = [(loss, error) for strength, loss, error in self.losses if strength == self.strength is not None]
        return max(((self.losses[0][1] - loss) / error for loss, error in found if error > 0), default=0.0)

    def foreign(self, inputs: HeadInputs) -> NDArray[np.bool_]:
        """Which answers (N,) are to questions unlike those that it was solved on; ALPHA of like ones are told to be so."""
        if self.outside is None:
            return np.zeros(len(inputs), dtype=bool)
        return np.asarray(self.outside.p_values(_asked(inputs, self.layers)) < ALPHA)

    def logit(self, inputs: HeadInputs) -> Array:
        """Log-odds of being right (N,) float64. UserError for states of another shape."""
        shape = self.weights["states"].shape
        if inputs.states.shape[1:] != shape:
            raise UserError(f"confidence head: reads states of shape {shape}, given {inputs.states.shape[1:]}")
        wide = {name: value.astype(np.float64) for name, value in self.weights.items()}
        linear = inputs.readings.astype(np.float64) @ wide["readings"] + _states(inputs) @ wide["states"].ravel()
        offset = _offset(inputs.logprob)
        told = wide["slope"][0] * offset + wide["bias"][0] + linear
        return np.asarray(np.where(self.foreign(inputs), wide["plain"][0] * offset + wide["plain"][1], told))

    def score(self, answered: Answered) -> SourceScores:
        """Probability of being right of answers that came with their states; no forward pass."""
        inputs, cost = HeadInputs.of(answered), Cost.none(len(answered.answers))
        return SourceScores(sigmoid(self.logit(inputs)), cost, True, by_likelihood=self.foreign(inputs))

    def save(self, output_dir: Path) -> None:
        """Write OUT/confidence_head/head.safetensors and head.json, each whole or not at all."""
        from safetensors.numpy import save_file

        folder = output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{STEM}.safetensors.partial"
        save_file({name: np.ascontiguousarray(value) for name, value in self.weights.items()}, partial)
        os.replace(partial, folder / f"{STEM}.safetensors")
        plain = {field.name for field in fields(self)} - {"weights", "outside"}
        facts = {name: getattr(self, name) for name in sorted(plain)}
        (folder / OUTSIDE).unlink(missing_ok=True)  # an earlier head's
        if self.outside is not None:
            replace(self.outside, fingerprint=self.fingerprint).save(folder / OUTSIDE)
        facts |= {"fingerprint": asdict(self.fingerprint), "positions": POSITIONS, "readings": READINGS}
        partial = folder / f"{STEM}.json.partial"
        partial.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(partial, folder / f"{STEM}.json")

    @classmethod
    def load(cls, output_dir: Path, fingerprint: Fingerprint) -> FittedHead:
        """The head of a run; UserError when there is none, or it is of other weights or another template."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = output_dir / FOLDER
        try:
            facts = json.loads((folder / f"{STEM}.json").read_text(encoding="utf-8"))
            made_for = Fingerprint(**facts.pop("fingerprint"))
            if (tuple(facts.pop("positions")), tuple(facts.pop("readings"))) != (POSITIONS, READINGS):
                raise ValueError("it reads what this version does not")
            layers, losses = tuple(facts.pop("layers")), tuple(tuple(one) for one in facts.pop("losses"))
            weights = load_file(folder / f"{STEM}.safetensors")
            head = cls(layers=layers, losses=losses, weights=weights, fingerprint=made_for, **facts)
            if (folder / OUTSIDE).is_file():
                head = replace(head, outside=Outside.load(folder / OUTSIDE, made_for))
            shapes = {name: value.shape for name, value in weights.items()}
            states = shapes.pop("states")
            plain = {"slope": (1,), "bias": (1,), "readings": (len(READINGS),), "plain": (2,)}
            if shapes != plain or states[:2] != (len(layers), len(POSITIONS)):
                raise ValueError("its arrays do not fit each other")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no confidence head that can be read ({error}); train with a `confidence_head:` section"
            ) from error
        advice = "it holds for the model that it was trained with alone, not after quantisation or further training"
        check_fingerprint(f"{folder}: a confidence head", made_for, fingerprint, advice)
        return head


def has_head(output_dir: Path) -> bool:
    """Whether a run has a head."""
    return (output_dir / FOLDER / f"{STEM}.json").is_file()


def fit_head(
    inputs: HeadInputs, correct: ArrayLike, layers: Sequence[int], fingerprint: Fingerprint, *, seed: int = 0
) -> tuple[FittedHead, Array]:
    """Solve for the head of graded answers, and its scores (N,) of them by heads that were solved without them.

    correct (N,) bool or 0/1. The same inputs and seed give the same head. Raises UserError for fewer than FEWEST right or
    wrong answers.
    """
    from sklearn.model_selection import StratifiedKFold

    grades = grades_of(correct, len(inputs))
    if min(grades.sum(), len(grades) - grades.sum()) < FEWEST:
        raise UserError(
            f"confidence head: {int(grades.sum())} of {len(grades)} answers are right; it needs {FEWEST} right and wrong "
            "ones"
        )
    offset, columns, standard = _offset(inputs.logprob), *_columns(inputs)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(grades[:, None], grades))
    tried, held = _cross_validated(offset, columns.z, grades, folds)
    losses = np.logaddexp(0.0, held) - grades * held
    chosen, errors = _choose(losses)
    solved = _solve(offset, columns.z, grades, tried[chosen], None)
    plain = _solve(offset, columns.z, grades, np.inf, None)[:2]
    halves = np.array_split(np.random.default_rng(seed).permutation(len(grades)), 2)
    asked = _asked(inputs, layers)
    outside, _ = fit_outside(asked[halves[0]], asked[halves[1]], fingerprint)
    head = FittedHead(
        layers=tuple(layers),
        weights=_folded(solved, columns, standard, inputs.states.shape[1:]) | {"plain": plain.astype(np.float32)},
        how="solved",
        n=len(grades),
        strength=_finite(tried[chosen]),
        losses=tuple(
            (_finite(strength), float(loss), float(error))
            for strength, loss, error in zip(tried, losses.mean(1), errors, strict=True)
        ),
        fingerprint=fingerprint,
        outside=outside,
    )
    return head, sigmoid(held[chosen])


def trained_head(weights: dict[str, torch.Tensor], layers: Sequence[int], fingerprint: Fingerprint) -> FittedHead:
    """The head as it was trained along the run, of its parameters by name."""
    arrays = {name: weights[name].detach().float().cpu().numpy() for name in ("slope", "bias", "readings")}
    states = weights["weight"].detach().float().cpu().numpy()
    arrays["states"] = states.reshape(len(layers), len(POSITIONS), -1)
    arrays["plain"] = np.array([1.0, 0.0], dtype=np.float32)
    return FittedHead(tuple(layers), arrays, "trained", 0, None, (), fingerprint)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Standardised readings and states in coordinates of as many dimensions as there are answers."""

    z: Array  # (N, R), R <= N
    directions: Array  # (R, D): z @ directions are the standardised columns


def _asked(inputs: HeadInputs, layers: Sequence[int]) -> NDArray[np.float32]:
    """The state of each question's last token in the last of the layers (N, H), which generation answers from."""
    return np.asarray(inputs.states[:, int(np.argmax(layers)), 0], dtype=np.float32)


def _offset(logprob: NDArray[np.float64]) -> Array:
    return np.asarray(log_odds(torch.from_numpy(np.asarray(logprob, dtype=np.float64))).numpy())


def _states(inputs: HeadInputs) -> Array:
    flat = normalized(torch.from_numpy(np.asarray(inputs.states, dtype=np.float32))).double().flatten(1)
    return np.asarray(flat.numpy())


def _columns(inputs: HeadInputs) -> tuple[_Columns, tuple[Array, Array]]:
    """Columns with mean 0; a reading has variance 1, all states together as well. Rotated, which no penalty sees."""
    states, readings = _states(inputs), inputs.readings.astype(np.float64)
    count = readings.shape[1]
    mean = np.concatenate([readings.mean(0), states.mean(0)])
    scale = np.concatenate([readings.std(0), states.std(0)])
    scale[scale < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = np.inf  # a constant column says nothing
    scale[count:] *= states.shape[1] ** 0.5
    x = ((states - mean[count:]) / scale[count:]).astype(np.float32)
    main = _main_directions(x, MOST_DIRECTIONS)
    directions = np.zeros((count + len(main), len(mean)))
    directions[:count, :count], directions[count:, count:] = np.eye(count), main
    z = np.concatenate([(readings - mean[:count]) / scale[:count], (x @ main.T).astype(np.float64)], axis=1)
    return _Columns(z, directions), (mean, scale)


def _main_directions(x: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """Orthonormal rows that span x's (N, D) `most` directions of largest variance, or all where these are no more.

    By two power iterations from random ones, always the same (Halko, Martinsson, Tropp, arXiv 0909.4061).
    """
    if min(x.shape) <= most:
        return np.asarray(np.linalg.svd(x, full_matrices=False)[2])
    start = np.random.default_rng(0).standard_normal((x.shape[1], most + 16)).astype(np.float32)
    basis = np.linalg.qr(x.T @ (x @ start))[0]
    basis = np.linalg.qr(x.T @ (x @ basis))[0]
    return np.asarray(np.linalg.svd(x @ basis, full_matrices=False)[2][:most] @ basis.T)


def _cross_validated(
    offset: Array, z: Array, grades: Array, folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> tuple[tuple[float, ...], Array]:
    """Strengths that were tried, and the log-odds (strengths, N) of answers by heads that were solved without them."""
    allowed = STRENGTHS if len(grades) >= LEAST_FOR_STATES else STRENGTHS[:1]
    starts: list[Array | None] = [None] * len(folds)
    held: list[Array] = []
    losses: list[float] = []
    for strength in allowed:
        row = np.zeros(len(grades))
        for place, (rows, others) in enumerate(folds):
            starts[place] = solved = _solve(offset[rows], z[rows], grades[rows], strength, starts[place])
            row[others] = _logit(solved, offset[others], z[others])
        held.append(row)
        losses.append(float((np.logaddexp(0.0, row) - grades * row).mean()))
        if len(losses) - 1 - int(np.argmin(losses)) >= LATER and np.argmin(losses) > 0:
            break
    return allowed[: len(held)], np.array(held)


def _solve(offset: Array, z: Array, grades: Array, strength: float, start: Array | None) -> Array:
    """Slope, bias and weights (2 + R,) of the least mean log loss + strength / 2 |weights|^2, by Newton's method.

    On the standardised offset, from slope 0: at slope 1 every sigmoid of a long answer is 0, and nothing bends.
    """
    width = 0 if np.isinf(strength) else z.shape[1]
    middle, spread = float(offset.mean()), float(offset.std())
    spread = spread if spread > 1e-9 * max(1.0, abs(middle)) else 1.0
    columns = np.column_stack([(offset - middle) / spread, np.ones_like(offset), z[:, :width]])
    penalty = np.concatenate([np.full(2, RIDGE), np.full(width, strength if width else 0.0)])

    def loss(w: Array) -> float:
        told = columns @ w
        return float((np.logaddexp(0.0, told) - grades * told).mean() + 0.5 * (penalty * w * w).sum())

    found = np.zeros(2 + width)
    found[1] = float(logit(grades.mean()))
    if start is not None:
        found = start[: 2 + width].copy()
        found[:2] = found[0] * spread, found[1] + found[0] * middle
    now = loss(found)
    for turn in range(NEWTON_STEPS):
        told = sigmoid(columns @ found)
        gradient = columns.T @ (told - grades) / len(grades) + penalty * found
        curvature = (columns * (told * (1 - told) / len(grades))[:, None]).T @ columns
        step = np.linalg.solve(curvature + np.diag(penalty), gradient)
        size = 1.0
        while (after := loss(found - size * step)) > now and size > 1e-6:
            size /= 2
        if now - after < CLOSE:
            if turn == 0 and start is None and 0.5 * float(gradient @ step) > FORESEEN:
                logger.warning(
                    "the confidence head: the first step of its solver gains nothing, so it knows no more than the share of "
                    "right answers; %d answers of %.3g nats on average",
                    len(grades),
                    -middle,
                )
            break
        found, now = found - size * step, after
    found[:2] = found[0] / spread, found[1] - found[0] * middle / spread
    return np.asarray(np.concatenate([found, np.zeros(z.shape[1] - width)]))


def _logit(solved: Array, offset: Array, z: Array) -> Array:
    return np.asarray(solved[0] * offset + solved[1] + z @ solved[2:])


def _choose(losses: Array) -> tuple[int, Array]:
    """The row of the least mean loss, or the first one's where that is not beyond chance; standard errors to the first."""
    means = losses.mean(1)
    errors = np.asarray((losses - losses[0]).std(1) / losses.shape[1] ** 0.5)
    best = int(means.argmin())
    return (best if means[0] - means[best] > BEYOND_CHANCE * errors[best] else 0), errors


def _folded(
    solved: Array, columns: _Columns, standard: tuple[Array, Array], shape: tuple[int, ...]
) -> dict[str, NDArray[np.float32]]:
    """The head's weights for readings and normalised states as they are."""
    mean, scale = standard
    plain = (solved[2:] @ columns.directions) / scale
    count = len(READINGS)
    found = {
        "slope": solved[:1],
        "bias": solved[1:2] - plain @ mean,
        "readings": plain[:count],
        "states": plain[count:].reshape(shape),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def _finite(strength: float) -> float | None:
    return None if np.isinf(strength) else float(strength)

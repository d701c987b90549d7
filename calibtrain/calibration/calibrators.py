"""Post-hoc calibrators under one contract: fit on graded answers, apply to others, JSON, guards, intervals.

    fitted = fit_calibrator("beta", scores, correct, template_hash=..., weights_hash=...)
    probabilities = fitted.apply(other_scores)

`scores` is a log-prob table (N, K) at TEMPERATURE_GRID, confidences (N,) of any source, or `scores_of(...)`. A method is a
pair of pure functions in METHODS; a new one is one line there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration import adaptive, domains, maps, shift, temperature, vectors
from calibtrain.calibration.intervals import poisson_weights
from calibtrain.calibration.scores import Array, Scores, grades_of, log_loss, scores_of
from calibtrain.errors import UserError

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """How one calibrator is fitted and applied. `weight` (N,) says how often each answer counts."""

    fit: Callable[[Scores, Array, Array], Parameters]
    apply: Callable[[Parameters, Scores], Array]
    # Parameters of many resamples, weights (R, N), where that is cheaper than R fits.
    refit: Callable[[Scores, Array, Array], list[Parameters]] | None = None
    # What of a resample's parameters is compared with the estimate's, where their shapes differ.
    compare: Callable[[Parameters, Parameters], Parameters] = lambda parameters, estimate: parameters
    # Ends of the intervals where the method has better ones than the bootstrap.
    intervals: Callable[[Scores, Array, Array, float], tuple[Parameters, Parameters]] | None = None
    # Probabilities (N, C) of all options, where the method reads them.
    options: Callable[[Parameters, Array], Array] | None = None


METHODS: dict[str, Method] = {
    "temperature": Method(
        temperature.fit_temperature, temperature.apply_temperature, refit=temperature.refit_temperature
    ),
    "platt": Method(maps.fit_platt, maps.apply_platt, compare=maps.without_marks),
    "beta": Method(maps.fit_beta, maps.apply_beta, compare=maps.without_marks),
    "isotonic": Method(maps.fit_isotonic, maps.apply_isotonic, compare=maps.isotonic_at_knots),
    "histogram": Method(maps.fit_histogram, maps.apply_histogram, compare=maps.histogram_values),
    "vector": Method(maps.fit_vector, maps.apply_vector),
    "vector_scaling": Method(
        vectors.fit_vector_scaling, vectors.apply_scaling, refit=vectors.refit_vector_scaling, options=vectors.scaled
    ),
    "matrix_scaling": Method(
        vectors.fit_matrix_scaling, vectors.apply_scaling, refit=vectors.refit_matrix_scaling, options=vectors.scaled
    ),
    "adaptive_temperature": Method(adaptive.fit_adaptive, adaptive.apply_adaptive),
    "domain_temperature": Method(domains.fit_domains, domains.apply_domains, intervals=domains.domain_intervals),
    "label_shift": Method(shift.fit_shift, shift.apply_shift, compare=maps.without_marks),
    "base_alignment": Method(
        temperature.fit_temperature, temperature.apply_temperature, refit=temperature.refit_temperature
    ),
}
"""Every method by name. `calibtrain.calibration.unlabelled` fits the last two without grades."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """A fitted map from scores to the probability of being right, and for which model and prompt template it holds."""

    method: str
    parameters: Parameters
    low: Parameters  # of every fitted parameter, the lower end of its interval at `level`
    high: Parameters
    level: float
    n: int  # answers it was fitted on
    nll_before: float | None  # mean log loss in nats given the confidence, on the fitted answers; None without grades
    nll_after: float | None  # the same given the calibrated probability
    template_hash: str
    weights_hash: str
    after: Calibrator | None = None  # a calibrator whose probabilities are this one's confidences

    def apply(self, scores: Scores | ArrayLike) -> Array:
        """Calibrated probabilities (N,) float64 of answers. UserError where the method needs more of them."""
        given = scores_of(scores)
        if self.after is not None:
            given = scores_of(self.after.apply(given))
        return np.clip(METHODS[self.method].apply(self.parameters, given), 0.0, 1.0)

    def option_probabilities(self, logprobs: Array) -> Array | None:
        """Calibrated probabilities (N, C) of options with these log-probs, by a method that reads them all; or None."""
        of_all = METHODS[self.method].options
        return None if of_all is None else of_all(self.parameters, logprobs)

    @property
    def temperature(self) -> float | None:
        """The (common) temperature, where the method has one."""
        return self.parameters.get("temperature")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, template_hash: str, weights_hash: str) -> Calibrator:
        """Calibrator of `as_dict()` values; UserError when it was fitted with another template or other weights."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise UserError(f"calibrator: expected the keys {sorted(names)}; run `calibtrain calibrate` again")
        method_of(values["method"])
        given = {"prompt template": template_hash, "weights": weights_hash}
        fitted = {"prompt template": values["template_hash"], "weights": values["weights_hash"]}
        for what, value in given.items():
            if value != fitted[what]:
                raise UserError(
                    f"{values['method']} calibrator: fitted with {what} {str(fitted[what])[:12]}, used with "
                    f"{value[:12]}; run `calibtrain calibrate` for this model and template"
                )
        inner = values["after"]
        if inner is not None:
            inner = cls.from_dict(inner, template_hash=template_hash, weights_hash=weights_hash)
        return cls(**{**values, "after": inner})

    @classmethod
    def from_json(cls, text: str, *, template_hash: str, weights_hash: str) -> Calibrator:
        """Calibrator of `to_json()` text; raises UserError as `from_dict`, and for text that is no JSON."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"calibrator: not JSON ({error}); run `calibtrain calibrate` again") from error
        return cls.from_dict(values, template_hash=template_hash, weights_hash=weights_hash)


def fit_calibrator(
    method: str,
    scores: Scores | ArrayLike,
    correct: ArrayLike,
    *,
    template_hash: str,
    weights_hash: str,
    ids: ArrayLike | None = None,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Calibrator:
    """Fit a method of METHODS on graded answers that were used for nothing else.

    correct (N,) bool or 0/1; ids (N,) integers for the bootstrap (answers of one id are resampled together), by default
    the row numbers. Raises UserError for malformed input, or when the method needs scores that are not given.
    """
    known, given = method_of(method), scores_of(scores)
    if method == "base_alignment":
        raise UserError(
            "base_alignment needs no grades: fit it by calibtrain.calibration.unlabelled.fit_base_alignment"
        )
    grades = grades_of(correct, len(given))
    fitted = fit_targets(
        method,
        given,
        grades,
        template_hash=template_hash,
        weights_hash=weights_hash,
        ids=ids,
        replicates=replicates,
        level=level,
        seed=seed,
    )
    after = log_loss(known.apply(fitted.parameters, given), grades)
    return replace(fitted, nll_before=log_loss(given.confidence, grades), nll_after=after)


def fit_targets(
    method: str,
    scores: Scores,
    targets: Array,
    *,
    template_hash: str,
    weights_hash: str,
    ids: ArrayLike | None,
    replicates: int,
    level: float,
    seed: int,
) -> Calibrator:
    """Fit a method to targets (N,) in [0, 1], grades or another model's confidences; without log losses."""
    parameters = method_of(method).fit(scores, targets, np.ones(len(scores)))
    low, high = parameter_intervals(method, scores, targets, parameters, ids, replicates, level, seed)
    return Calibrator(
        method=method,
        parameters=parameters,
        low=low,
        high=high,
        level=level,
        n=len(scores),
        nll_before=None,
        nll_after=None,
        template_hash=template_hash,
        weights_hash=weights_hash,
    )


def cross_fit(
    method: str,
    scores: Scores | ArrayLike,
    correct: ArrayLike,
    *,
    ids: ArrayLike | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Array:
    """Probabilities (N,), each by a calibrator fitted without that answer: honest numbers from the fitting answers.

    Answers of one id (N,) lie in one fold. Raises UserError as `fit_calibrator`, and for fewer ids than folds.
    """
    known, given = method_of(method), scores_of(scores)
    grades = grades_of(correct, len(given))
    names, place = np.unique(np.arange(len(given)) if ids is None else np.asarray(ids), return_inverse=True)
    if not 2 <= folds <= len(names):
        raise UserError(f"cross_fit: {folds} folds of {len(names)} questions; take at least 2 and at most as many")
    fold = np.random.default_rng(seed).permutation(len(names))[place] % folds
    found = np.empty(len(given))
    for one in range(folds):
        fitted, held = np.flatnonzero(fold != one), np.flatnonzero(fold == one)
        parameters = known.fit(given.take(fitted), grades[fitted], np.ones(len(fitted)))
        found[held] = known.apply(parameters, given.take(held))
    return np.clip(found, 0.0, 1.0)


def parameter_intervals(
    method: str,
    scores: Scores,
    targets: Array,
    estimate: Parameters,
    ids: ArrayLike | None,
    replicates: int,
    level: float,
    seed: int,
) -> tuple[Parameters, Parameters]:
    """Ends of the interval of every numeric parameter: the method's own, or percentiles of bootstrap refits."""
    known = method_of(method)
    if known.intervals is not None:
        return known.intervals(scores, targets, np.ones(len(scores)), level)
    if replicates < 1:
        return {}, {}
    keys: NDArray[Any] = np.arange(len(scores)) if ids is None else np.asarray(ids)
    if keys.shape != (len(scores),):
        raise UserError(f"calibrator: {len(scores)} answers with {keys.size} ids; give one id per answer")
    weights = np.stack([poisson_weights(keys, replicate, seed) for replicate in range(replicates)]).astype(np.float64)
    weights = weights[weights.any(1)]
    draws = (
        [known.fit(scores, targets, weight) for weight in weights]
        if known.refit is None
        else known.refit(scores, targets, weights)
    )
    compared = [known.compare(draw, estimate) for draw in draws]
    low, high = (
        {name: np.quantile([draw[name] for draw in compared], share, axis=0).tolist() for name in compared[0]}
        for share in ((1 - level) / 2, (1 + level) / 2)
    )
    return low, high


def method_of(name: str) -> Method:
    """The method of this name; UserError for one that METHODS lacks."""
    if name not in METHODS:
        raise UserError(f"calibrator: unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]

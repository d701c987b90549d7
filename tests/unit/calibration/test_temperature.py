import json

import numpy as np
import pytest

from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.calibration.temperature import interpolate_logprobs, loss_curve, tabulate
from calibtrain.errors import UserError

HASHES = {"template_hash": "t" * 64, "weights_hash": "w" * 64}


def answers(n=800, seed=0):
    """Greedy answers of 3 tokens over a vocabulary of 40: log-prob of each as a function of the temperature."""
    logits = np.random.default_rng(seed).normal(0, 2.5, (n, 3, 40))

    def logprob_at(temperature):
        z = logits / temperature
        z = z - z.max(-1, keepdims=True)
        return (z - np.log(np.exp(z).sum(-1, keepdims=True))).max(-1).sum(-1)

    return logprob_at


def graded(temperature, seed=0):
    logprob_at = answers(seed=seed)
    q = np.exp(logprob_at(temperature))
    return logprob_at, np.random.default_rng(seed + 1).random(len(q)) < q


@pytest.mark.parametrize("true", [0.7, 1.0, 1.6])
def test_fit_recovers_the_temperature_the_grades_were_drawn_at(true):
    logprob_at, correct = graded(true)
    fitted = fit_calibrator("temperature", tabulate(logprob_at), correct, replicates=60, **HASHES)
    assert fitted.temperature == pytest.approx(true, rel=0.15)
    assert fitted.low["temperature"] < true < fitted.high["temperature"]
    assert fitted.nll_after <= fitted.nll_before + 1e-9
    assert fitted.apply(tabulate(logprob_at)) == pytest.approx(np.exp(logprob_at(fitted.temperature)), abs=1e-4)


def test_fit_is_the_maximum_of_the_posterior():
    logprob_at, correct = graded(1.4)
    fitted = fit_calibrator("temperature", tabulate(logprob_at), correct, replicates=0, **HASHES)

    def loss(temperature):
        logprob = logprob_at(temperature)
        likelihood = np.where(correct, logprob, np.log(-np.expm1(logprob)))
        return -likelihood.sum() + np.log(temperature) ** 2 / 2

    fine = fitted.temperature * np.exp(np.linspace(-0.2, 0.2, 401))
    assert fitted.temperature == pytest.approx(min(fine, key=loss), rel=2e-3)


def test_spline_is_close_between_the_temperatures_of_the_table():
    logprob_at = answers()
    for temperature in (0.3, 0.93, 1.234, 4.4):
        assert interpolate_logprobs(tabulate(logprob_at), temperature) == pytest.approx(
            logprob_at(temperature), abs=2e-4
        )


@pytest.mark.parametrize("grade", [0, 1])
def test_one_class_leaves_a_finite_temperature(grade):
    fitted = fit_calibrator("temperature", tabulate(answers(50)), np.full(50, grade), replicates=10, **HASHES)
    assert TEMPERATURE_GRID[0] <= fitted.temperature <= TEMPERATURE_GRID[-1]
    assert np.isfinite([fitted.low["temperature"], fitted.high["temperature"], fitted.nll_after]).all()


def test_one_wrong_answer_at_certainty_does_not_break_the_fit():
    table = np.zeros((40, len(TEMPERATURE_GRID)))
    table[1:] = tabulate(answers(39))
    fitted = fit_calibrator("temperature", table, np.arange(40) % 2, replicates=5, **HASHES)
    assert np.isfinite(fitted.temperature)


def test_json_round_trip_and_guards():
    logprob_at, correct = graded(1.3)
    fitted = fit_calibrator("temperature", tabulate(logprob_at), correct, replicates=10, **HASHES)
    assert Calibrator.from_json(fitted.to_json(), **HASHES) == fitted
    for key, what in (("template_hash", "prompt template"), ("weights_hash", "weights")):
        with pytest.raises(UserError, match=what):
            Calibrator.from_json(fitted.to_json(), **{**HASHES, key: "other"})
    for text in ("{", "[]", json.dumps({"temperature": 1})):
        with pytest.raises(UserError, match="calibrator: "):
            Calibrator.from_json(text, **HASHES)


@pytest.mark.parametrize(
    ("table", "correct", "temperatures", "message"),
    [
        (np.full((2, 5), -1.0), [1, 0], TEMPERATURE_GRID, "shape"),
        (np.full((2, 4), np.nan), [1, 0], (0.5, 0.9, 1.1, 2.0), "answer 0 at temperature 0.5"),
        (np.full((2, 4), 0.5), [1, 0], (0.5, 0.9, 1.1, 2.0), "natural logarithms"),
        (np.full((2, 4), -1.0), [1], (0.5, 0.9, 1.1, 2.0), "one grade per answer"),
        (np.full((2, 4), -1.0), [1, 1.5], (0.5, 0.9, 1.1, 2.0), "between 0 and 1"),
        (np.full((2, 4), -1.0), [1, 0], (1.5, 1.9, 2.1, 3.0), "across 1"),
        (np.full((2, 4), -1.0), [1, 0], (0.5, 0.4, 1.1, 2.0), "ascending"),
    ],
)
def test_bad_input_is_refused(table, correct, temperatures, message):
    with pytest.raises(UserError, match=message):
        loss_curve(table, correct, temperatures)

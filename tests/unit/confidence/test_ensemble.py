"""Several sources as one: better than its parts where they complement each other, kept as JSON, guarded."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from calibtrain.calibration.ranking import auroc
from calibtrain.calibration.scores import sigmoid
from calibtrain.calibration.state import state_of
from calibtrain.confidence.ensemble import FOLDS, Ensemble, cross_scores, fit_ensemble
from calibtrain.confidence.features import Fingerprint
from calibtrain.errors import UserError

PRINT = Fingerprint("w" * 64, "t" * 64)


def made(n, seed):
    """Right with a chance that two sources know halves of, a third nothing."""
    rng = np.random.default_rng(seed)
    a, b, noise = rng.normal(size=(3, n))
    correct = rng.random(n) < sigmoid(1.5 * a + 1.5 * b)
    return {"a": sigmoid(2 * a), "b": sigmoid(b), "noise": sigmoid(noise)}, correct


def ranks(scores, correct):
    import torch

    return auroc(state_of(torch.from_numpy(np.asarray(scores)), torch.from_numpy(correct)))


@pytest.fixture(scope="module")
def fitted():
    return fit_ensemble(*made(2000, 0), PRINT)


def test_it_beats_its_parts_and_is_calibrated_on_other_answers(fitted):
    scores, correct = made(4000, 1)
    together = fitted.score(scores)
    assert ranks(together, correct) > max(ranks(one, correct) for one in scores.values()) + 0.05
    assert together.mean() == pytest.approx(correct.mean(), abs=0.02)
    sure = together > 0.8
    assert correct[sure].mean() == pytest.approx(together[sure].mean(), abs=0.04)
    weights = dict(zip(fitted.sources, np.abs(fitted.weights), strict=True))
    assert weights["noise"] < 0.1 * min(weights["a"], weights["b"])


def test_its_numbers_are_scikit_learns_at_the_chosen_strength(fitted):
    scores, correct = made(2000, 0)
    x = np.stack([np.log(scores[name] / (1 - scores[name])) for name in fitted.sources], axis=1)
    z = (x - x.mean(0)) / x.std(0)
    model = LogisticRegression(C=fitted.strength, max_iter=1000).fit(z, correct)
    assert fitted.score(scores) == pytest.approx(model.predict_proba(z)[:, 1], abs=1e-6)


def test_it_survives_json_and_only_for_its_model(fitted):
    scores, _ = made(50, 2)
    again = Ensemble.from_json(fitted.to_json(), PRINT)
    assert again == fitted
    assert np.array_equal(again.score(scores), fitted.score(scores))
    with pytest.raises(UserError, match="ensemble"):
        Ensemble.from_json(fitted.to_json(), Fingerprint("x" * 64, "t" * 64))


@pytest.mark.parametrize("change", [{"weights": [1.0]}, {"more": 1}, {"fingerprint": 3}])
def test_other_json_is_refused(fitted, change):
    with pytest.raises(UserError, match="ensemble: not one that can be read"):
        Ensemble.from_json(json.dumps(json.loads(fitted.to_json()) | change), PRINT)
    with pytest.raises(UserError, match="ensemble"):
        Ensemble.from_json("[", PRINT)


def test_extreme_and_constant_scores_do_no_harm():
    scores, correct = made(400, 3)
    scores["a"][:5] = 0.0
    scores["a"][5:9] = 1.0
    scores["constant"] = np.full(400, 0.5)
    found = fit_ensemble(scores, correct, PRINT)
    assert np.isfinite(found.score(scores)).all()


@pytest.mark.parametrize("nats", [1.0, 20.0, 150.0])
def test_the_likelihood_of_long_answers_counts(nats):
    """As much as that of short ones, beside a source that knows the other half; a few tiny scores decide nothing."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 2000))
    correct = rng.random(2000) < sigmoid(1.5 * a + 1.5 * b)
    scores = {"likelihood": np.exp(-nats * (1 - 0.2 * a).clip(0.01)), "b": sigmoid(b)}
    together = fit_ensemble(scores, correct, PRINT).score(scores)
    assert ranks(together, correct) > ranks(sigmoid(a + b), correct) - 0.01
    few = {"a": sigmoid(a), "b": sigmoid(b)}
    plain = fit_ensemble(few, correct, PRINT)
    few["a"] = few["a"].copy()
    few["a"][np.flatnonzero(correct)[:5]] = 1e-300
    assert fit_ensemble(few, correct, PRINT).weights == pytest.approx(plain.weights, rel=0.1)


def test_an_ensemble_of_an_earlier_version_tells_what_it_told(fitted):
    values = json.loads(fitted.to_json())
    del values["least"]
    earlier = Ensemble.from_json(json.dumps(values), PRINT)
    scores = {name: np.array([0.0, 1e-30, 1e-4, 0.5, 1.0]) for name in fitted.sources}
    assert earlier.score(scores) == pytest.approx(
        earlier.score({name: one.clip(1e-4, 1) for name, one in scores.items()}), abs=0
    )


def test_cross_scores_are_of_ensembles_that_did_not_see_the_answer():
    """Many sources that know nothing: fitted on its own answers an ensemble seems to rank, across folds it does not."""
    rng = np.random.default_rng(0)
    scores, correct = {f"s{i}": rng.random(80) for i in range(30)}, rng.random(80) < 0.5
    seen = fit_ensemble(scores, correct, PRINT).score(scores)
    unseen = cross_scores(scores, correct, PRINT)
    assert ranks(seen, correct) > 0.65
    assert ranks(unseen, correct) < 0.6
    with pytest.raises(UserError, match=f"needs {2 * FOLDS} right and wrong"):
        cross_scores(scores, np.arange(80) < 9, PRINT)


def test_what_cannot_be_fitted_is_told(fitted):
    scores, correct = made(100, 4)
    with pytest.raises(UserError, match=f"needs {FOLDS} right and wrong"):
        fit_ensemble(scores, np.ones(100), PRINT)
    with pytest.raises(UserError, match="no scores of b"):
        fitted.score({"a": scores["a"], "noise": scores["noise"]})
    with pytest.raises(UserError, match="equally many"):
        fit_ensemble({**scores, "b": scores["b"][:50]}, correct, PRINT)
    with pytest.raises(UserError, match="not a number"):
        fit_ensemble({**scores, "b": np.full(100, np.nan)}, correct, PRINT)
    with pytest.raises(UserError, match="no sources"):
        fit_ensemble({}, correct, PRINT)

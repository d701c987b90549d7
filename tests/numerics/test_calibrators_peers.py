"""Calibrators against scikit-learn and netcal on the same answers, and against references written out in float64."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.scores import logit

HASHES = {"template_hash": "t", "weights_hash": "w", "replicates": 0}


def answers(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.beta(1.3, 1.1, n)
    q = np.clip(expit(1.7 * logit(truth) + 0.4), 1e-4, 1 - 1e-4)
    return q, rng.random(n) < truth


def test_beta_is_the_least_log_loss():
    q, y = answers(800)
    found = fit_calibrator("beta", q, y, **HASHES).parameters

    def loss(abc):
        z = abc[0] * np.log(q) - abc[1] * np.log1p(-q) + abc[2]
        return (np.logaddexp(0, z) - y * z).sum() + 0.005 * ((abc - [1, 1, 0]) ** 2).sum()

    best = minimize(
        loss, [0.5, 0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 9999}
    )
    assert [found["a"], found["b"], found["c"]] == pytest.approx(best.x, abs=2e-4)


def test_platt_is_scikit_learns():
    from sklearn.calibration import _SigmoidCalibration

    q, y = answers()
    theirs = _SigmoidCalibration().fit(logit(q), y)
    ours = fit_calibrator("platt", q, y, **HASHES).parameters
    assert (ours["slope"], ours["intercept"]) == pytest.approx((-theirs.a_, -theirs.b_), abs=1e-4)


def test_isotonic_is_scikit_learns_with_one_answer_more_at_each_end():
    from sklearn.isotonic import IsotonicRegression

    q, y = answers()
    theirs = IsotonicRegression(out_of_bounds="clip").fit(
        np.concatenate([q, [q.min(), q.max()]]), np.concatenate([y, [1, 0]])
    )
    at = np.linspace(0, 1, 500)
    assert fit_calibrator("isotonic", q, y, **HASHES).apply(at) == pytest.approx(theirs.predict(at), abs=1e-12)


@pytest.mark.parametrize("method", ["vector_scaling", "matrix_scaling"])
def test_scaling_of_options_is_the_least_log_loss(method):
    from calibtrain.calibration.scores import scores_of

    rng = np.random.default_rng(1)
    z = rng.normal(0, 1.5, (500, 3))
    right = (1.4 * z + [0.5, 0, -0.5] + rng.gumbel(size=z.shape)).argmax(1)
    hot = np.eye(3)[right]
    scores = scores_of(options=z, right=hot)
    found = fit_calibrator(method, scores, right == z.argmax(1), **HASHES).parameters
    strength = found.get("regularisation", 0.0)

    def loss(w):
        weights, bias = (w[:9].reshape(3, 3), w[9:]) if method == "matrix_scaling" else (np.diag(w[:3]), w[3:])
        logits = z @ weights.T + bias
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(500), right]
        off = weights * (1 - np.eye(3))
        odir = strength * ((off**2).sum() / 6 + (bias**2).sum() / 3)  # Kull et al. 2019, with lambda = mu
        return nll.sum() + odir + 0.005 * (((weights - np.eye(3)) ** 2).sum() + (bias**2).sum())

    ours = np.concatenate([np.ravel(found["scale"]), found["bias"]])
    start = np.zeros(len(ours)) + 0.3
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-6})
    assert loss(ours) == pytest.approx(best.fun, rel=1e-7)
    assert ours == pytest.approx(best.x, abs=2e-3)


@pytest.mark.peer
class TestNetcal:
    @pytest.fixture(autouse=True)
    def _netcal(self):
        pytest.importorskip("netcal", reason="oracle for beta, isotonic, histogram and logistic calibration")

    @pytest.mark.filterwarnings("ignore")
    def test_beta(self):
        from netcal.scaling import BetaCalibration

        q, y = answers()
        theirs = BetaCalibration()
        theirs.fit(q, y)
        assert fit_calibrator("beta", q, y, **HASHES).apply(q) == pytest.approx(theirs.transform(q), abs=2e-3)

    @pytest.mark.filterwarnings("ignore")
    def test_logistic(self):
        from netcal.scaling import LogisticCalibration

        q, y = answers()
        theirs = LogisticCalibration(temperature_only=False)
        theirs.fit(q, y)
        # Platt's smoothed targets, which netcal lacks, are 1 answer in 4000.
        assert fit_calibrator("platt", q, y, **HASHES).apply(q) == pytest.approx(theirs.transform(q), abs=2e-3)

    @pytest.mark.filterwarnings("ignore")
    def test_isotonic(self):
        from netcal.binning import IsotonicRegression

        q, y = answers()
        theirs = IsotonicRegression()
        theirs.fit(q, y)
        inner = (q > np.quantile(q, 0.05)) & (q < np.quantile(q, 0.95))  # the ends are kept off 0 and 1 here
        assert fit_calibrator("isotonic", q, y, **HASHES).apply(q)[inner] == pytest.approx(
            theirs.transform(q)[inner], abs=1e-6
        )

    @pytest.mark.filterwarnings("ignore")
    def test_histogram(self):
        from netcal.binning import HistogramBinning

        # netcal has bins of equal width only: on evenly spread confidences they hold equally many answers, as ours do.
        n = 15 * 200
        q = (np.arange(n) + 0.5) / n
        y = np.random.default_rng(1).random(n) < q**2
        theirs = HistogramBinning(bins=15)
        theirs.fit(q, y)
        ours, share = fit_calibrator("histogram", q, y, **HASHES).apply(q), theirs.transform(q)
        certain = (share == 0) | (share == 1)  # ours say 1 / 202 from there
        assert ours[~certain] == pytest.approx(share[~certain], abs=1e-12)
        assert np.abs(ours - share)[certain] == pytest.approx(1 / 202)

    @pytest.mark.filterwarnings("ignore")
    def test_temperature_of_two_outcomes(self):
        # netcal scales the log-odds of a binary confidence; an answer of one token of a vocabulary of two is just that.
        from netcal.scaling import TemperatureScaling

        from calibtrain.calibration.scores import TEMPERATURE_GRID

        q, y = answers()
        table = np.log(expit(np.abs(logit(q))[:, None] / np.array(TEMPERATURE_GRID)))
        right = np.where(q >= 0.5, y, ~y)
        theirs = TemperatureScaling()
        theirs.fit(expit(np.abs(logit(q))), right)
        ours = fit_calibrator("temperature", table, right, **HASHES)
        assert ours.apply(table) == pytest.approx(theirs.transform(expit(np.abs(logit(q)))), abs=3e-3)

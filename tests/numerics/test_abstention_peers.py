"""Certificates against MAPIE's risk control on the same answers."""

import numpy as np
import pytest
from scipy.stats import binom

from calibtrain.abstention.certificate import certify
from calibtrain.abstention.hallucination import control_hallucinations

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _mapie():
    pytest.importorskip("mapie.risk_control", reason="oracle for learn-then-test and conformal risk control")


def answers(n, seed):
    rng = np.random.default_rng(seed)
    q = rng.beta(1.5, 0.8, n)
    return q, rng.random(n) < q


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [100, 400, 1500])
def test_fixed_sequence_certificate_is_mapies_precision_control(n, seed):
    from mapie.risk_control import BinaryClassificationController

    q, y = answers(n, seed)
    thresholds = np.linspace(0.97, 0.0, 60)
    theirs = BinaryClassificationController(
        lambda x: np.stack([1 - x, x], axis=1),
        "precision",
        target_level=0.8,
        confidence_level=0.95,
        list_predict_params=thresholds,
        fwer_method="fixed_sequence",
    ).calibrate(q, y.astype(int))
    valid = np.asarray(theirs.valid_predict_params)
    ours = certify(q, y, 0.2, 0.05, thresholds=thresholds.tolist()).certificate
    assert (ours is None) == (len(valid) == 0)
    if ours is None or ours.threshold == pytest.approx(valid.min()):
        return
    # Theirs takes binom.cdf at ceil(n * risk), where a rounding error counts one error more than there is: it may stop
    # earlier, and only where one error more is one too many.
    assert ours.threshold < valid.min()
    stopped = q >= thresholds[np.searchsorted(-thresholds, -valid.min(), side="right")]
    assert (
        binom.cdf((stopped & ~y).sum(), stopped.sum(), 0.2)
        <= 0.05
        < binom.cdf((stopped & ~y).sum() + 1, stopped.sum(), 0.2)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [30, 200, 1000])
def test_hallucination_control_is_mapies_conformal_risk_control(n, seed):
    from mapie.risk_control.methods import get_r_hat_plus

    q, y = answers(n, seed)
    found = control_hallucinations(q, y, 0.1)
    # Answering above each confidence, or everything: the joint loss is 1 where an answer is given and wrong.
    candidates = np.append(0.0, np.nextafter(np.sort(q), 2.0))
    losses = (q[:, None] >= candidates) & ~y[:, None]
    _, bound = get_r_hat_plus(losses.astype(float), candidates, "crc", None, None, None)
    lowest = candidates[bound <= 0.1 + 1e-12].min()
    assert ((q >= found.threshold) == (q >= lowest)).all()

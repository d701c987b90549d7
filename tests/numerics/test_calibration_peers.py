"""Agreement with scikit-learn, torchmetrics and relplot on the same samples."""

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.state import state_of

pytestmark = pytest.mark.peer


def sample(n=2000, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    q = rng.beta(0.8, 0.7, n) if decimals is None else rng.beta(0.8, 0.7, n).round(decimals)
    return q, rng.random(n) < q**1.4


def test_scikit_learn():
    q, y = sample()
    state = state_of(q, y)
    assert metrics.brier(state) == pytest.approx(brier_score_loss(y, q), abs=1e-12)
    assert metrics.nll(state) == pytest.approx(log_loss(y, np.clip(q, 1e-6, 1 - 1e-6)), abs=1e-9)
    assert ranking.auroc(state) == pytest.approx(roc_auc_score(y, q), abs=ranking.auroc_error(state) + 1e-12)
    tied, y = sample(decimals=2)  # ties only inside cells of their own: no error bound is needed
    assert ranking.auroc(state_of(tied, y)) == pytest.approx(roc_auc_score(y, tied), abs=1e-12)


@pytest.mark.parametrize("bins", [10, 15, 30])
def test_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional", reason="oracle for ECE, RMS and max calibration error")
    q, y = sample()
    pair = torch.tensor(q), torch.tensor(y).long()
    ours = {"l1": metrics.ece, "l2": metrics.rms_calibration_error, "max": metrics.max_calibration_error}
    for norm, metric in ours.items():
        theirs = functional.classification.binary_calibration_error(*pair, n_bins=bins, norm=norm)
        assert metric(state_of(q, y), bins) == pytest.approx(float(theirs), abs=1e-6), norm


def test_torchmetrics_puts_confidence_one_in_a_bin_of_its_own():
    # torchmetrics bins are [lo, hi) over bins + 1 edges (bucketize right=True), so 1.0 alone has one more bin
    # and a confidence on an edge into the bin above. Ours are (lo, hi], with 1.0 in the last bin.
    functional = pytest.importorskip("torchmetrics.functional", reason="shows where its bins differ from ours")
    q, y = torch.tensor([0.95, 1.0], dtype=torch.float64), torch.tensor([0, 1])
    theirs = functional.classification.binary_calibration_error(q, y, n_bins=10, norm="l1")
    assert float(theirs) == pytest.approx(0.95 / 2)
    assert metrics.ece(state_of(q, y), 10) == pytest.approx((1.95 - 1) / 2)
    q, y = torch.tensor([0.95, 1.0, 1.0], dtype=torch.float64), torch.tensor([0, 1, 1])
    theirs = functional.classification.binary_calibration_error(q, y, n_bins=10, norm="max")
    assert float(theirs) == pytest.approx(0.95)
    assert metrics.max_calibration_error(state_of(q, y), 10) == pytest.approx((2.95 - 2) / 3)


@pytest.mark.parametrize(("n", "seed"), [(300, 0), (3000, 1)])
@pytest.mark.filterwarnings("ignore")
def test_relplot(n, seed):
    relplot = pytest.importorskip("relplot", reason="oracle for the smooth ECE")
    q, y = sample(n, seed)
    # relplot adds 1e-4 to its density and stops after 10 halvings of the width.
    assert metrics.smooth_ece(state_of(q, y)) == pytest.approx(relplot.smECE(q, y.astype(float)), abs=1.5e-3)
    for width in (0.03, 0.1):
        theirs = relplot.metrics.smECE_sigma(q, y.astype(float), width)
        assert metrics.smooth_ece_at(state_of(q, y), width) == pytest.approx(theirs, rel=0.01, abs=5e-4)

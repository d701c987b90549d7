"""The answer scores are proper, equal their formulas, and are finite where a probability is 0 or 1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.losses import answer_brier_score, answer_log_score

SCORES = [answer_log_score, answer_brier_score]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("truth", [0.1, 0.32, 0.5, 0.9])
def test_expected_score_is_least_at_the_truth(score, truth):
    grades = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < truth).double()
    q = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    means = torch.stack([score(p.log().expand(grades.shape), grades).mean() for p in q])
    assert abs(q[means.argmin()] - grades.mean()) <= 0.001
    assert abs(grades.mean() - truth) < 0.015


@pytest.mark.parametrize("score", SCORES)
def test_descent_finds_the_truth(score):
    """The gradient through the log-prob vanishes at q = share of right answers and only there."""
    grades = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    for q, sign in ((0.2, -1.0), (0.4, 0.0), (0.6, 1.0)):
        logprob = torch.tensor(q, dtype=torch.float64).log().requires_grad_()
        score(logprob.expand(5), grades).mean().backward()
        assert logprob.grad.item() == pytest.approx(0.0, abs=1e-12) if sign == 0 else logprob.grad.sign() == sign


@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score):
    logprob = torch.tensor([-0.01, -0.5, -0.7, -3.0], dtype=torch.float64, requires_grad=True)
    for grade in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda x, grade=grade: score(x, torch.full_like(x, grade)), (logprob,))


def test_values():
    logprob = torch.tensor([0.25, 0.25, 1.0, 1.0], dtype=torch.float64).log()
    grades = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(answer_brier_score(logprob, grades), torch.tensor([0.5625, 0.0625, 0.0, 1.0]).double())
    log_scores = answer_log_score(logprob, grades)
    torch.testing.assert_close(log_scores[:3], torch.tensor([1.3862943611, 0.2876820724, 0.0]).double())
    assert 300 < log_scores[3] < 400  # sure and wrong: large, and finite


@pytest.mark.parametrize("score", SCORES)
@given(st.floats(min_value=-1e4, max_value=0.0, width=32), st.sampled_from([0.0, 1.0]))
def test_finite_everywhere(score, point, grade):
    for edge in (point, 0.0, -1000.0):
        logprob = torch.tensor([edge], requires_grad=True)
        value = score(logprob, torch.tensor([grade]))
        value.sum().backward()
        assert value.isfinite().all()
        assert value >= 0
        assert logprob.grad.isfinite().all()


def test_scores_are_scikit_learns():
    from sklearn.metrics import brier_score_loss, log_loss

    generator = torch.Generator().manual_seed(0)
    q = torch.rand(200, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    grades = (torch.rand(200, generator=generator) < q).double()
    assert answer_log_score(q.log(), grades).mean().item() == pytest.approx(log_loss(grades, q), abs=1e-12)
    assert answer_brier_score(q.log(), grades).mean().item() == pytest.approx(brier_score_loss(grades, q), abs=1e-12)

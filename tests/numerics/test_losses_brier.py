"""Token Brier and tokenised Brier against their formulas over all logits, and what they promise."""

from __future__ import annotations

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses.brier import TokenBrierLoss, TokenizedBrierLoss, token_brier, tokenized_brier
from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY
from tests.numerics.dense import Head, Row, batch_of

LEVELS = [3, 11, 7, 20, 5]  # tokens of confidence 0, 1/4, ... 1, in no order of ids


@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_token_brier_equals_formula(sharp):
    rows = [Row(CHOSEN, [1, 2, 3, 4], prompt=1), Row(ANSWER, [5, 6], correct=1.0), Row(CHOSEN, [7, 22])]
    batch, head = batch_of(rows), Head(8, sharp=sharp)

    def dense(logits):
        read = torch.tensor([1, 2, 3, 6, 7])
        onehot = torch.nn.functional.one_hot(batch.targets, logits.shape[1])
        return 0.7 * (logits.softmax(1) - onehot).square().sum(1)[read].mean()

    head.assert_equals(TokenBrierLoss(weight=0.7), batch, dense)


def test_token_brier_in_float32_is_off_by_the_rounding_of_one():
    p = torch.tensor([[1 - 1e-7, 1e-7], [0.3, 0.7], [1e-30, 1.0], [1.0, 0.0]], dtype=torch.float64)
    expected = (p - torch.tensor([1.0, 0.0])).square().sum(1)
    ours = token_brier(p[:, 0].log().float().clamp(min=-100), p.square().sum(1).float())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=3e-7)


def test_token_brier_is_proper():
    """The expected score over drawn tokens is least where the distribution is their shares."""
    truth = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    drawn = torch.multinomial(truth, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        value = token_brier(logp[drawn], logp.exp().square().sum().expand(len(drawn))).mean()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(0).detach(), shares.double(), rtol=0, atol=1e-5)
    assert (shares - truth).abs().max() < 0.015


def test_token_brier_gradcheck_and_edges():
    logprob = torch.tensor([-0.01, -0.7, -5.0], dtype=torch.float64, requires_grad=True)
    sum_p2 = torch.tensor([0.98, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(token_brier, (logprob, sum_p2))
    for value in (0.0, -1e-30, -1e4, float("-inf")):
        edge = torch.tensor([value], requires_grad=True)
        token_brier(edge, torch.tensor([0.5])).sum().backward()
        assert edge.grad.isfinite().all()


def query_rows():
    """Ragged rows, so that no place counted from an end is right for all; a stated 0.25 of an answer without grade."""
    return [
        Row(CHOSEN, [1, LEVELS[0], 2]),
        Row(QUERY, [LEVELS[4], 9], correct=1.0),
        Row(QUERY, [4, 4, 4, LEVELS[1], LEVELS[2], 9, 9], prompt=3, correct=0.0),
        Row(QUERY, [LEVELS[1], 9]),
        Row(QUERY, [8, LEVELS[1]], correct=1.0),  # another loss's query: it does not begin with a confidence
        Row(QUERY, [LEVELS[3]], correct=1.0),
    ]


def published_tokenized_brier(logits, level_ids, correct):
    """ConfTuner's loss_type 'brier', written out: a softmax over the confidence tokens' logits alone."""
    probabilities = torch.softmax(logits[:, level_ids], dim=-1)
    n = len(level_ids) - 1
    return torch.stack(
        [
            sum(p[i] * ((1 - i / n) ** 2 if c else (i / n) ** 2) for i in range(n + 1))
            for p, c in zip(probabilities, correct, strict=True)
        ]
    )


@pytest.mark.parametrize("sharp", [1.0, 5.0])
def test_tokenized_brier_equals_the_authors_formula(sharp):
    batch, head = batch_of(query_rows()), Head(17, sharp=sharp)

    def dense(logits):
        where = torch.tensor([3, 8, 16])
        return 2.0 * published_tokenized_brier(logits[where], LEVELS, [True, False, True]).mean()

    head.assert_equals(TokenizedBrierLoss(token_set=LEVELS, weight=2.0), batch, dense)


def test_tokenized_brier_reads_the_place_and_nothing_else():
    """Only the hidden states at the stated confidences get a gradient, not those at the rows' ends."""
    batch, head = batch_of(query_rows()), Head(17)
    loss = TokenizedBrierLoss(token_set=LEVELS)
    assert int(loss.counts(batch)["tokenized_brier"]) == 3
    hidden, weight = head.gradients(head.through_ops(loss, batch))
    assert hidden.abs().sum(1).nonzero().flatten().tolist() == [3, 8, 16]
    # Tokens outside the set are the batch's targets or nothing: the softmax is over the set alone.
    assert weight.abs().sum(1)[[i for i in range(23) if i not in LEVELS]].max() < 1e-14


@pytest.mark.parametrize(("truth", "best"), [(0.04, 0), (0.3, 1), (0.55, 2), (0.8, 3), (0.95, 4)])
def test_tokenized_brier_is_least_at_the_token_nearest_to_the_truth(truth, best):
    grades = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < truth).double()
    points = torch.eye(5, dtype=torch.float64).log().clamp(min=-1e4)
    means = torch.stack([tokenized_brier(point.expand(len(grades), 5), grades).mean() for point in points])
    assert means.argmin() == best
    spread = torch.full((5,), 0.2, dtype=torch.float64).log()
    assert tokenized_brier(spread.expand(len(grades), 5), grades).mean() > means.min()


def test_tokenized_brier_gradcheck_and_edges():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: tokenized_brier(x, correct), (logits,))
    sure = torch.tensor([[0.0, -1e4, -1e4], [-1e4, -1e4, 0.0]], requires_grad=True)
    values = tokenized_brier(sure, torch.tensor([1.0, 1.0]))
    assert values.tolist() == [1.0, 0.0]
    values.sum().backward()
    assert sure.grad.isfinite().all()


def test_tokens_must_differ():
    """A tokenizer that splits digits makes 1 and 10 the same first token: then two confidences would be one."""
    with pytest.raises(UserError, match="distinct"):
        TokenizedBrierLoss(token_set=[5, 6, 5])

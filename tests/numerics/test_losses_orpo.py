"""The odds-ratio loss against its formula in high precision, and ORPOLoss against TRL's trainer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses import CHOSEN, REJECTED, Batch, ORPOLoss, mean_loss, orpo_odds_ratio_loss
from calibtrain.ops import fused_linear_token_stats

EDGES = [0.0, -1e-12, -1e-7, -1e-3, -0.5, -0.693, -3.0, -80.0, -1e4]


def naive(chosen: float, rejected: float) -> float:
    """-log sigmoid of the log odds ratio, with enough digits to need no care."""
    with mpmath.workdps(5000 if min(chosen, rejected) < -1e3 else 120):
        odds = [mpmath.exp(x) / (1 - mpmath.exp(x)) for x in (mpmath.mpf(chosen), mpmath.mpf(rejected))]
        return float(mpmath.log(1 + odds[1] / odds[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", EDGES[1:])
def test_odds_ratio_equals_formula(chosen, dtype):
    rejected = torch.tensor(EDGES[1:], dtype=dtype)
    chosens = torch.full_like(rejected, chosen)
    actual = orpo_odds_ratio_loss(chosens, rejected)
    expected = torch.tensor(
        [naive(c, r) for c, r in zip(chosens.tolist(), rejected.tolist(), strict=True)], dtype=dtype
    )
    # Two log-odds of either sign are subtracted: their rounding is absolute, and exp turns it relative.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chosen", EDGES)
def test_odds_ratio_is_finite_at_every_edge(chosen):
    rejected = torch.tensor(EDGES, requires_grad=True)
    chosens = torch.full((len(EDGES),), chosen, requires_grad=True)
    losses = orpo_odds_ratio_loss(chosens, rejected)
    losses.sum().backward()
    for tensor in (losses, chosens.grad, rejected.grad):
        assert tensor.isfinite().all()
    assert (chosens.grad <= 0).all()
    assert (rejected.grad >= 0).all()


def test_odds_ratio_gradcheck():
    chosen, rejected = (-torch.rand(2, 12, dtype=torch.float64).mul(3.0).add(0.01)).unbind()
    assert torch.autograd.gradcheck(orpo_odds_ratio_loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothed_odds_ratio_is_least_where_the_noise_says(smoothing):
    chosen, rejected = (-torch.rand(2, 40, dtype=torch.float64).mul(3.0).add(0.01)).unbind()
    r = [logit(math.exp(c)) - logit(math.exp(x)) for c, x in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    expected = [(1 - smoothing) * math.log1p(math.exp(-x)) + smoothing * math.log1p(math.exp(x)) for x in r]
    actual = orpo_odds_ratio_loss(chosen, rejected, label_smoothing=smoothing)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    # Against a rejected answer of odds 1, the best chosen one has odds (1 - e) / e.
    best = torch.tensor([math.log(1 - smoothing)], dtype=torch.float64, requires_grad=True)
    even = torch.tensor([math.log(0.5)], dtype=torch.float64)
    orpo_odds_ratio_loss(best, even, label_smoothing=smoothing).sum().backward()
    assert best.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_capped_odds_ratio_leaves_decided_pairs_alone():
    chosen = torch.tensor([-0.01, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-4.0, -1.0, -0.5], dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        plain = orpo_odds_ratio_loss(chosen, rejected, label_smoothing=smoothing)
        capped = orpo_odds_ratio_loss(chosen, rejected, label_smoothing=smoothing, cap=2.0)
        (gradient,) = torch.autograd.grad(capped.sum(), chosen)
        assert gradient[0] == 0.0
        assert capped[0].item() == pytest.approx(
            (1 - smoothing) * math.log1p(math.exp(-2)) + smoothing * math.log1p(math.exp(2))
        )
        assert capped[1:].equal(plain[1:])
        assert (gradient[1:] < 0).all()


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"cap": 1.0}, {"label_smoothing": 0.2, "cap": 1.0}])
def test_bounded_odds_ratio_gradcheck_and_edges(options):
    chosen, rejected = (-torch.rand(2, 12, dtype=torch.float64).mul(3.0).add(0.01)).unbind()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: orpo_odds_ratio_loss(c, r, **options), inputs)
    grid = torch.tensor(EDGES)
    edges = [grid.repeat(len(EDGES)).requires_grad_(), grid.repeat_interleave(len(EDGES)).requires_grad_()]
    losses = orpo_odds_ratio_loss(*edges, **options)
    losses.sum().backward()
    assert all(x.isfinite().all() for x in (losses, *(edge.grad for edge in edges)))


def test_label_smoothing_of_a_half_is_refused():
    with pytest.raises(UserError, match="label_smoothing"):
        ORPOLoss(label_smoothing=0.5)


@pytest.fixture(scope="module")
def trl_trainer():
    orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL's ORPO trainer is the oracle")
    trainer = object.__new__(orpo.ORPOTrainer)  # its loss needs these attributes and nothing of a training run
    trainer.beta = 0.3
    trainer.aux_loss_enabled = False
    trainer.is_encoder_decoder = False
    trainer.padding_value = 0
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    return trainer


@pytest.mark.peer
def test_odds_ratio_equals_trl(trl_trainer):
    generator = torch.Generator().manual_seed(0)
    leaves = [(-4 * torch.rand(50, generator=generator) - 1e-4).requires_grad_() for _ in range(2)]
    theirs = -trl_trainer.odds_ratio_loss(*leaves)[0]
    ours = trl_trainer.beta * orpo_odds_ratio_loss(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, e in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.peer
def test_whole_loss_equals_trl(trl_trainer):
    """Same hidden states and head: TRL's loss (NLL over prompt and completion) is ORPOLoss(nll_scope="full")."""
    table, weight = torch.randn(40, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    pairs, width = 3, 9
    lengths = {"chosen": [9, 5, 7], "rejected": [6, 9, 4]}
    prompts = [3, 2, 1]
    trl_batch = {}
    for half, sizes in lengths.items():
        ids = torch.randint(1, 40, (pairs, width))
        mask = torch.arange(width) < torch.tensor(sizes)[:, None]
        completion = mask & (torch.arange(width) >= torch.tensor(prompts)[:, None])
        trl_batch[f"{half}_input_ids"] = ids.where(mask, torch.zeros(()).long())
        trl_batch[f"{half}_attention_mask"] = mask.long()
        trl_batch[f"{half}_labels"] = ids.where(completion, torch.tensor(-100))
    seen = {}

    def model(input_ids, attention_mask, use_cache):
        seen["ids"], seen["mask"] = input_ids, attention_mask
        return SimpleNamespace(logits=table[input_ids] @ weight.t())

    theirs, _ = trl_trainer.get_batch_loss_metrics(model, trl_batch)

    labels = torch.cat([trl_batch["chosen_labels"], trl_batch["rejected_labels"]])
    rows, columns = (seen["mask"][:, 1:] == 1).nonzero(as_tuple=True)
    nans = torch.full((2 * pairs,), float("nan"))
    batch = Batch(
        input_ids=seen["ids"],
        position_ids=torch.arange(width).expand(2 * pairs, width),
        segment_ids=seen["mask"].int(),
        target_positions=rows * width + columns,
        targets=seen["ids"][rows, columns + 1],
        sequence_ids=rows,
        is_completion=labels[rows, columns + 1] != -100,
        roles=torch.tensor([CHOSEN] * pairs + [REJECTED] * pairs),
        pair_ids=torch.arange(pairs).repeat(2),
        correct=nans,
        record_ids=torch.arange(2 * pairs),
    )
    hidden = table[batch.input_ids].flatten(0, 1)[batch.target_positions]
    stats = fused_linear_token_stats(hidden, weight, batch.targets)
    ours = mean_loss(ORPOLoss(beta=trl_trainer.beta, nll_scope="full")(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, e in zip(*(torch.autograd.grad(x, (table, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

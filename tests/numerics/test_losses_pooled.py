"""MMCE and soft-binned ECE against their published formulas; unbiasedness; what the memory bank makes of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import softmax

from calibtrain.errors import UserError
from calibtrain.losses import pooled
from calibtrain.losses.pooled import (
    MemoryBank,
    MMCELoss,
    SoftBinnedECELoss,
    mmce_against,
    mmce_squared,
    soft_binned_ece_against,
    soft_binned_ece_squared,
)
from calibtrain.losses.terms import ANSWER, CHOSEN
from calibtrain.ops import TokenStats
from tests.numerics.dense import Row, batch_of

LOSSES = {"mmce": MMCELoss, "soft_binned_ece": SoftBinnedECELoss}


def answers(count, seed=0, over=0.0):
    """Confidences U(0.5, 1) and grades drawn at them, less `over`: calibrated for 0."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    return confidence, (torch.rand(count, generator=generator) < confidence - over).double()


def published_mmce(confidence, correct):
    """The public code's sum over all pairs, its diagonal included, divided by N^2."""
    total = sum(
        (correct[i] - confidence[i])
        * (correct[j] - confidence[j])
        * torch.exp(-(confidence[i] - confidence[j]).abs() / 0.4)
        for i in range(len(confidence))
        for j in range(len(confidence))
    )
    return total / len(confidence) ** 2


def published_soft_binned_ece(confidence, correct, bins=15, temperature=0.01):
    """The authors' definition by loops: weights, means of bins, the square of the weighted 2-norm."""
    anchors = [(k + 0.5) / bins for k in range(bins)]
    weights = [softmax(torch.stack([-((r - b) ** 2) / temperature for b in anchors]), 0) for r in confidence]
    total = 0.0
    for k in range(bins):
        mass = sum(w[k] for w in weights)
        mean_confidence = sum(w[k] * r for w, r in zip(weights, confidence, strict=True)) / mass.clamp(min=1e-5)
        accuracy = sum(w[k] * c for w, c in zip(weights, correct, strict=True)) / mass.clamp(min=1e-5)
        total = total + mass / len(confidence) * (mean_confidence - accuracy) ** 2
    return total


def value_and_gradient(function, confidence, correct):
    leaf = confidence.clone().requires_grad_()
    value = function(leaf, correct)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def test_mmce_is_the_published_sum_without_its_diagonal():
    confidence, correct = answers(11, over=0.2)
    size = len(confidence)

    def off_diagonal(r, c):
        return (published_mmce(r, c) * size**2 - (c - r).square().sum()) / (size * (size - 1))

    for ours, theirs in zip(
        value_and_gradient(mmce_squared, confidence, correct),
        value_and_gradient(off_diagonal, confidence, correct),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.peer
def test_mmce_equals_netcal():
    """netcal gives the root of the sum with its diagonal; binary labels at 1/2 make its `matched` our grades."""
    netcal = pytest.importorskip("netcal.metrics.confidence", reason="netcal is the oracle of MMCE")
    confidence, correct = answers(60, over=0.3)
    theirs = netcal.MMCE().measure(confidence.numpy(), correct.numpy().astype(int)) ** 2
    ours = mmce_squared(confidence, correct) * 60 * 59 / 60**2 + (correct - confidence).square().sum() / 60**2
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.peer
def test_mmce_gradient_is_that_of_netcals_penalty():
    """Theirs, for training, is the root of the weighted form: with as many right as wrong, twice the plain one's."""
    regularization = pytest.importorskip("netcal.regularization", reason="netcal is the oracle of MMCE's gradient")
    logits = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.where(torch.arange(40) % 2 == 0, logits.argmax(1), logits.argmin(1))
    theirs = (regularization.MMCEPenalty()(logits, labels) / 2) ** 2
    confidence, correct = logits.softmax(1).amax(1), (torch.arange(40) % 2 == 0).double()
    ours = mmce_squared(confidence, correct) * 40 * 39 / 40**2 + (correct - confidence).square().sum() / 40**2
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    gradients = [torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_soft_binned_ece_equals_formula(temperature):
    confidence, correct = answers(12, over=0.2)
    options = {"bins": 7, "temperature": temperature}
    for ours, theirs in zip(
        value_and_gradient(lambda r, c: soft_binned_ece_squared(r, c, **options), confidence, correct),
        value_and_gradient(lambda r, c: published_soft_binned_ece(r, c, **options), confidence, correct),
        strict=True,
    ):
        # The public code's floor on a bin's mass, 1e-5, is above that of bins that hold next to nothing.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_mmce_is_unbiased_at_every_batch_size(size):
    """Calibrated: 0 on average over 10,000 batches, where the published sum is E[r(1-r)]/N above it."""
    confidence, correct = (one.view(10_000, size) for one in answers(10_000 * size))
    ours = torch.vmap(mmce_squared)(confidence, correct)
    assert abs(ours.mean()) < 3 * ours.std() / math.sqrt(len(ours))
    with_diagonal = ours * (size - 1) / size + (correct - confidence).square().sum(1) / size**2
    bias = (0.75 * 0.25 - 1 / 48) / size  # E[r(1-r)] for U(1/2, 1)
    assert abs(with_diagonal.mean() - bias) < 3 * with_diagonal.std() / math.sqrt(len(ours))


def bank_of(confidence, correct):
    return torch.stack([confidence, correct], dim=1)


def test_against_another_sample_is_unbiased_for_mmce():
    """Overconfident by 0.2: over 10,000 small batches, each with a bank of its own, within 3 s.e. of 0.04 E[kernel]."""
    sizes = (8, 32)
    (r, c), (bank_r, bank_c) = (
        [one.view(10_000, size) for one in answers(10_000 * size, seed=size, over=0.2)] for size in sizes
    )
    everyone = torch.ones(sizes, dtype=torch.bool)
    shares = torch.vmap(lambda *one: mmce_against(*one, everyone))(r, c, torch.stack([bank_r, bank_c], dim=2))
    estimates = shares.mean(1)
    kernel = 2 / 0.5**2 * (0.5 * 0.4 - 0.4**2 * (1 - math.exp(-0.5 / 0.4)))  # of |r - r'|, both U(1/2, 1)
    assert abs(estimates.mean() - 0.2**2 * kernel) < 3 * estimates.std() / math.sqrt(len(estimates))


def test_equal_bank_and_answers_give_the_statistic_and_its_gradient():
    """Against themselves, each left out for itself: MMCE's sum over pairs, and with the module's factor its gradient."""
    confidence, correct = answers(9, over=0.2)
    others = ~torch.eye(9, dtype=torch.bool)
    bank = bank_of(confidence, correct)
    module = MMCELoss()
    ours = value_and_gradient(lambda r, c: module.shares(r, c, bank, others).mean(), confidence, correct)
    for actual, expected in zip(ours, value_and_gradient(mmce_squared, confidence, correct), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_soft_binned_ece_touches_at_its_own_bank_and_is_below_it_elsewhere():
    confidence, correct = answers(40, over=0.2)
    everyone = torch.ones(40, 40, dtype=torch.bool)

    def against(bank):
        return lambda r, c: soft_binned_ece_against(r, c, bank, everyone).mean()

    value, gradient = value_and_gradient(soft_binned_ece_squared, confidence, correct)
    same, same_gradient = value_and_gradient(against(bank_of(confidence, correct)), confidence, correct)
    torch.testing.assert_close(same, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-10, atol=1e-13)
    for seed in range(1, 30):
        assert against(bank_of(*answers(40, seed)))(confidence, correct) <= value


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    confidence, correct = answers(6, over=0.2)
    bank, comparable = bank_of(*answers(5, 3, over=0.1)), torch.ones(6, 5, dtype=torch.bool)
    comparable[2, 1] = comparable[4] = False
    leaf = confidence.requires_grad_()
    against = {"mmce": mmce_against, "soft_binned_ece": soft_binned_ece_against}[name]
    pooled = {"mmce": mmce_squared, "soft_binned_ece": soft_binned_ece_squared}[name]
    assert torch.autograd.gradcheck(lambda r: against(r, correct, bank, comparable), (leaf,))
    assert torch.autograd.gradcheck(lambda r: pooled(r, correct), (leaf,))


@pytest.mark.parametrize("function", [mmce_squared, soft_binned_ece_squared])
@pytest.mark.parametrize("points", [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 0.5, 0.5]])
def test_edges_are_finite(function, points):
    for grade in (0.0, 1.0):
        confidence = torch.tensor(points, requires_grad=True)
        value = function(confidence, torch.full_like(confidence, grade))
        value.backward()
        assert value.isfinite()
        assert confidence.grad.isfinite().all()


@pytest.mark.parametrize("function", [mmce_squared, soft_binned_ece_squared])
def test_answers_that_cannot_be_pooled_are_refused(function):
    """Alone in its micro-batch an answer has no MMCE: 0 would look like calibration."""
    for count in range(2 if function is mmce_squared else 1):
        with pytest.raises(UserError, match="earlier"):
            function(torch.rand(count), torch.ones(count))


def test_calibration_is_the_minimum():
    """Shifting the confidences of a calibrated sample by hand can only raise both."""
    confidence, correct = answers(1500, seed=7)
    for function in (mmce_squared, soft_binned_ece_squared):
        at_truth = function(confidence, correct)
        for shift in (-0.15, 0.15):
            assert function((confidence + shift).clamp(0, 1), correct) > at_truth + 0.005


def step_batch(items):
    """One answer of one token an item (confidence, grade, record); a CHOSEN sequence that no pooled loss reads."""
    rows = [Row(CHOSEN, [0]), *(Row(ANSWER, [0], correct=c, record=k) for _, c, k in items)]
    logprob = torch.tensor([float("nan"), *(math.log(r) for r, _, _ in items)], dtype=torch.float64).requires_grad_()
    zeros = torch.zeros_like(logprob)
    return TokenStats(logprob, zeros, zeros, zeros, zeros > 0), batch_of(rows), logprob


def run_steps(loss, steps, parts):
    """Value and gradient by item of each step, cut into `parts` micro-batches in another order each time."""
    found = []
    for step, items in enumerate(steps):
        order = sorted(items, key=lambda item: hash((parts, step, item)))
        value, gradients = 0.0, {}
        for part in range(parts):
            chosen = order[part::parts]
            stats, batch, leaf = step_batch(chosen)
            (term,) = loss(stats, batch).values()
            assert int(term.count) == len(chosen) == int(loss.counts(batch)[loss.name])
            (gradient,) = torch.autograd.grad(term.total / len(items), leaf)
            assert gradient[0] == 0
            value += term.total.item() / len(items)
            gradients.update(zip(chosen, gradient[1:].tolist(), strict=True))
        loss.after_step()
        found.append((value, gradients))
    return found


def three_steps():
    steps = []
    for step in range(3):
        r, c = answers(16, seed=step, over=0.2)
        steps.append([(a, b, 100 * step + k) for k, (a, b) in enumerate(zip(r.tolist(), c.tolist(), strict=True))])
    return steps


@pytest.mark.parametrize("name", LOSSES)
def test_invariant_to_the_layout_of_the_batch(name):
    reference = run_steps(LOSSES[name](bank_size=24), three_steps(), 1)
    assert reference[0][0] == 0.0  # nothing to compare with yet
    assert all(abs(value) > 1e-4 for value, _ in reference[1:])
    for parts in (2, 8, 16):
        for (value, gradients), (expected, expected_gradients) in zip(
            run_steps(LOSSES[name](bank_size=24), three_steps(), parts), reference, strict=True
        ):
            assert value == pytest.approx(expected, rel=1e-12)
            assert gradients == pytest.approx(expected_gradients, rel=1e-11, abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_an_answer_is_never_compared_with_itself(name):
    """The same questions asked again: what the bank holds of a record does not touch that record."""
    loss = LOSSES[name]()
    run_steps(loss, [[(0.9, 1.0, 5)], [(0.9, 1.0, 5)]], 1)
    assert loss.bank.items.shape == (2, 3)
    ((value, gradients),) = run_steps(loss, [[(0.7, 0.0, 5)]], 1)
    assert value == 0.0
    assert set(gradients.values()) == {0.0}


@pytest.mark.parametrize("name", LOSSES)
def test_state_goes_through_a_checkpoint(name):
    steps = three_steps()
    loss = LOSSES[name](bank_size=24)
    run_steps(loss, steps[:2], 2)
    saved = copy.deepcopy(loss.state_dict())
    fresh = LOSSES[name](bank_size=24)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.bank.items, loss.bank.items)
    assert run_steps(fresh, steps[2:], 2) == run_steps(loss, steps[2:], 2)


@pytest.mark.parametrize("name", LOSSES)
def test_only_training_fills_the_bank(name):
    loss = LOSSES[name]().eval()
    run_steps(loss, three_steps()[:1], 1)
    assert loss.bank.items.shape == (0, 3)


def test_bank_keeps_the_newest_and_drops_what_is_no_number():
    bank = MemoryBank(3)
    for step in range(3):
        base = 10.0 * step
        bank.add(torch.tensor([0.3, float("nan")]), torch.tensor([1.0, 0.0]), torch.tensor([base + 1, base]))
        bank.add(torch.tensor([0.2, 0.1]), torch.tensor([0.0, float("nan")]), torch.tensor([base, base]))
        bank.end_step()
    assert bank.items[0, 2] in (10.0, 11.0)
    assert sorted(bank.items[1:, 2].tolist()) == [20.0, 21.0]
    assert not bank.items.requires_grad
    bank.end_step()  # a step without answers
    assert len(bank.items) == 3
    with pytest.raises(UserError, match="capacity"):
        MemoryBank(0)


def test_a_step_that_brings_more_than_fits_keeps_any_of_them():
    """Not those of the highest record ids; the same ones in whatever order and parts they come, others at the next step."""
    draw = torch.Generator().manual_seed(0)
    ids, confidence = torch.arange(4000.0), torch.rand(4000, generator=draw)
    kept = []
    for parts in (1, 7):
        bank = MemoryBank(1000)
        found = []
        for _ in range(3):  # of the same records
            for rows in torch.randperm(4000, generator=draw).chunk(parts):
                bank.add(confidence[rows], torch.ones(len(rows)), ids[rows])
            bank.end_step()
            found.append(bank.items.clone())
        kept.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    for found in kept[0]:
        assert len(found) == 1000
        shares = torch.histc(found[:, 2], 8, 0, 4000) / 1000
        assert float((shares - 1 / 8).abs().max()) < 4 * (1 / 8 * 7 / 8 / 1000) ** 0.5
    first, second, _ = (set(found[:, 2].tolist()) for found in kept[0])
    assert len(first & second) < 400  # 250 by chance


def test_a_rank_that_has_nothing_gathers_where_its_answers_were(monkeypatch):
    """After `forget_step`, as every rank but the first of a group: on the device of the others' (meta stands for CUDA)."""
    gathered = []
    monkeypatch.setattr(pooled, "_gather_rows", lambda rows: gathered.append(rows.device.type) or torch.zeros(0, 3))
    bank = MemoryBank(8)
    bank.add(*(torch.rand(3, device="meta") for _ in range(3)))
    bank.forget_step()
    bank.end_step()
    bank.end_step()  # and a step of which it has nothing to forget
    assert gathered == ["meta", "meta"]


@pytest.mark.parametrize("name", LOSSES)
def test_overconfidence_goes_away(name):
    """Descent on fresh, small, cut-up batches: answers right 60% of the time come to confidence 0.6, from 0.9.

    Up to noise, on average over the last steps: the bank's delay makes it swing.
    """
    generator = torch.Generator().manual_seed(0)
    loss = LOSSES[name](bank_size=128)
    logit = torch.tensor(2.2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=1.0)
    path = []
    for step in range(160):
        optimizer.zero_grad()
        for part in range(2):
            grades = (torch.rand(8, generator=generator) < 0.6).double().tolist()
            rows = [Row(ANSWER, [0], correct=c, record=16 * step + 8 * part + k) for k, c in enumerate(grades)]
            logprob = torch.nn.functional.logsigmoid(logit).expand(8)
            zeros = torch.zeros(8)
            (term,) = loss(TokenStats(logprob, zeros, zeros, zeros, zeros > 0), batch_of(rows)).values()
            (term.total / 16).backward()
        optimizer.step()
        loss.after_step()
        path.append(logit.sigmoid().item())
    assert abs(sum(path[80:]) / 80 - 0.6) < 0.05

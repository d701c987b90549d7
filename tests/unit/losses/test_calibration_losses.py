"""The calibration losses on batches: what counts, what is left out, and that micro-batches cannot be seen."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses.brier import TokenBrierLoss, TokenizedBrierLoss
from calibtrain.losses.calibration_aware import CalibrationAwareLoss
from calibtrain.losses.calibration_tuning import CorrectnessQueryLoss, DivergenceAnchor
from calibtrain.losses.focal import ConfidencePenalty, FocalLoss, LabelSmoothingLoss
from calibtrain.losses.idk import IDKLoss
from calibtrain.losses.pooled import MMCELoss, SoftBinnedECELoss
from calibtrain.losses.refusal import RefusalTuningLoss
from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY, REJECTED, mean_loss
from calibtrain.ops import TokenStats
from tests.numerics.dense import NAN, Row, batch_of

NO, YES, IDK = 1, 2, 9
LOSSES = {
    "token_brier": lambda: TokenBrierLoss(weight=0.5),
    "tokenized_brier": lambda: TokenizedBrierLoss(token_set=[NO, 5, YES]),
    "focal": FocalLoss,
    "focal-full": lambda: FocalLoss(gamma=0.5, sample_dependent=False, nll_scope="full"),
    "label_smoothing": lambda: LabelSmoothingLoss(token_set=[3, 4, 5]),
    "confidence_penalty": ConfidencePenalty,
    "mmce": lambda: with_bank(MMCELoss(weight=2.0)),
    "soft_binned_ece": lambda: with_bank(SoftBinnedECELoss()),
    "idk": lambda: IDKLoss(token_set=[IDK]),
    "correctness_query": lambda: CorrectnessQueryLoss(token_set=[NO, YES]),
    "divergence_anchor": DivergenceAnchor,
    "calibration_aware": lambda: fitted(CalibrationAwareLoss()),
    "refusal": lambda: RefusalTuningLoss(refusal_share=0.3),
}
READ = {name: {CHOSEN} for name in LOSSES} | {
    "tokenized_brier": {QUERY},
    "correctness_query": {QUERY},
    "mmce": {ANSWER},
    "soft_binned_ece": {ANSWER},
    "calibration_aware": {ANSWER},
    "divergence_anchor": {CHOSEN, REJECTED, ANSWER, QUERY},
}


def with_bank(loss):
    generator = torch.Generator().manual_seed(1)
    grades = (torch.rand(40, generator=generator) < 0.5).double()
    loss.bank.items = torch.stack(
        [torch.rand(40, generator=generator).double(), grades, torch.arange(500.0, 540.0).double()], 1
    )
    return loss


def fitted(loss):
    loss.fit(torch.linspace(0, 1, 9), torch.tensor([0.0, 0, 1, 0, 0, 1, 1, 0, 1]))
    return loss


def made(rows, dtype=torch.float64, poisoned=frozenset(), edges=()):
    """Stats, batch, set log-probs and the leaf that holds log-prob, entropy, sum_p2 and set log-probs, (N, 3 + 3)."""
    batch = batch_of(rows)
    count = len(batch.targets)
    # Numbers of a token depend on its record and place alone, so that a row has the same in every micro-batch.
    seeds = [1000 * row.record + t for row in rows for t in range(len(row.targets))]
    noise = torch.empty(count, 6)
    for i, one in enumerate(seeds):
        noise[i] = torch.rand(6, generator=torch.Generator().manual_seed(one))
    leaf = torch.cat([-3 * noise[:, :1], 2 * noise[:, 1:2], noise[:, 2:3], -4 * noise[:, 3:]], 1).to(dtype)
    if edges:
        leaf[:, 0] = torch.tensor([edges[i % len(edges)] for i in range(count)])
        leaf[:, 3:] = leaf[:, :1]
    bad = torch.isin(batch.roles, torch.tensor(sorted(poisoned), dtype=torch.int64))[batch.sequence_ids]
    leaf = torch.where(bad[:, None], NAN, leaf).requires_grad_()
    confidence = torch.maximum(leaf[:, 0].detach().exp(), torch.tensor(0.4, dtype=dtype)).nan_to_num(0.5)
    stats = TokenStats(leaf[:, 0], leaf[:, 1], leaf[:, 2], confidence, leaf[:, 0].detach() > -0.9)
    reference = torch.where(noise[:, 5] < 0.6, -2 * noise[:, 4], NAN).float()
    return stats, replace(batch, reference_logprob=torch.where(bad, NAN, reference)), leaf


def call(name, loss, stats, batch, leaf):
    columns = {"tokenized_brier": 3, "label_smoothing": 3, "correctness_query": 2, "idk": 1}.get(name)
    return loss(stats, batch, leaf[:, 3 : 3 + columns]) if columns else loss(stats, batch)


def many_rows(seed, count=40):
    rng = random.Random(seed)
    rows = []
    for record in range(count):
        role = rng.choice([CHOSEN, CHOSEN, REJECTED, ANSWER, ANSWER, QUERY, QUERY])
        length = rng.randint(1, 5)
        prompt = rng.randint(0, length) if role != QUERY else 0
        targets = [rng.randint(0, 9) for _ in range(length)]
        if role == QUERY:
            targets[0] = rng.choice([NO, YES])
        rows.append(Row(role, targets, prompt, rng.choice([0.0, 1.0, NAN]), record))
    return rows


@pytest.mark.parametrize("name", LOSSES)
def test_counts_come_from_the_data_alone(name):
    stats, batch, leaf = made(many_rows(0))
    terms, counts = call(name, LOSSES[name](), stats, batch, leaf), LOSSES[name]().counts(batch)
    assert terms.keys() == counts.keys()
    for key, term in terms.items():
        assert term.count == counts[key] > 0
        assert term.count.dtype == counts[key].dtype == torch.int64
        assert term.total.shape == term.count.shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_other_roles_cannot_touch_the_loss(name):
    """NaN in the sequences a loss does not read changes neither its value nor its gradients."""
    others = {CHOSEN, REJECTED, ANSWER, QUERY} - READ[name]
    found = []
    for poisoned in (frozenset(), frozenset(others)):
        stats, batch, leaf = made(many_rows(1), poisoned=poisoned)
        value = mean_loss(call(name, LOSSES[name](), stats, batch, leaf))
        found.append((value, torch.autograd.grad(value, leaf)[0]))
    (clean, gradient), (value, same) = found
    assert torch.equal(clean, value)
    assert torch.equal(gradient, same)
    assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_global_normalisation_does_not_see_micro_batches(name):
    rows = many_rows(2)

    def gradients(parts):
        order = random.Random(parts).sample(rows, len(rows)) if parts > 1 else rows
        micro = [made(order[i::parts]) for i in range(parts)]
        loss, counts = LOSSES[name](), {}
        for _, batch, _ in micro:
            for key, count in loss.counts(batch).items():
                counts[key] = counts.get(key, 0) + int(count)
        total, found = 0.0, {}
        for i, (stats, batch, leaf) in enumerate(micro):
            value = sum(t.weight * t.total / max(1, counts[k]) for k, t in call(name, loss, stats, batch, leaf).items())
            (gradient,) = torch.autograd.grad(value, leaf)
            total += value.item()
            places = [(row.record, t) for row in order[i::parts] for t in range(len(row.targets))]
            found.update({place: one.tolist() for place, one in zip(places, gradient, strict=True)})
        return total, torch.tensor([found[place] for place in sorted(found)])

    value, expected = gradients(1)
    assert expected.count_nonzero() > 0
    for parts in (2, 8):
        other, found = gradients(parts)
        assert other == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


edge = st.sampled_from([0.0, -1e-12, -1e-8, -1e-3, -0.7, -30.0, -1000.0])


@settings(max_examples=80)
@given(st.lists(edge, min_size=1, max_size=5), st.integers(0, 5), st.integers(0, 12), st.sampled_from(sorted(LOSSES)))
def test_finite_at_the_edges(edges, seed, count, name):
    stats, batch, leaf = made(many_rows(seed, count), torch.float32, edges=tuple(edges))
    terms = call(name, LOSSES[name](), stats, batch, leaf)
    loss = mean_loss(terms)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    assert gradient is None or gradient.isfinite().all()


def test_refusals_weigh_their_share_whatever_their_number():
    rows = [
        Row(CHOSEN, [3, 3], 1, 1.0, 0),
        Row(CHOSEN, [3] * 4, 0, 0.0, 1),
        Row(CHOSEN, [3], 0, NAN, 2),
        Row(ANSWER, [3]),
    ]
    stats, batch, _ = made(rows)
    terms = RefusalTuningLoss(refusal_share=0.3)(stats, batch)
    assert {name: (int(t.count), t.weight) for name, t in terms.items()} == {
        "nll_known": (2, 0.7),
        "nll_refusal": (4, 0.3),
    }
    known, refused = -stats.logprob[[1, 6]].mean(), -stats.logprob[2:6].mean()
    torch.testing.assert_close(mean_loss(terms), 0.7 * known + 0.3 * refused, rtol=1e-12, atol=1e-12)
    full = RefusalTuningLoss(nll_scope="full").counts(batch)
    assert {name: int(count) for name, count in full.items()} == {"nll_known": 3, "nll_refusal": 4}


def test_half_and_half_is_sft_on_a_balanced_batch():
    """With as many tokens of each kind, shares of one half are the plain mean over tokens."""
    rows = [Row(CHOSEN, [3, 3], 0, 1.0, 0), Row(CHOSEN, [3, 3], 0, 0.0, 1)]
    stats, batch, _ = made(rows)
    torch.testing.assert_close(mean_loss(RefusalTuningLoss()(stats, batch)), -stats.logprob.mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(gamma=-1.0), "gamma"),
        (lambda: LabelSmoothingLoss(token_set=[]), "token_set"),
        (lambda: LabelSmoothingLoss(token_set=[1], epsilon=1.0), "epsilon"),
        (lambda: SoftBinnedECELoss(temperature=0.0), "temperature"),
        (lambda: MMCELoss(bank_size=0), "capacity"),
        (lambda: RefusalTuningLoss(refusal_share=1.1), "refusal_share"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_state_dict_holds_no_token_ids(name):
    """Token ids come from the config and its tokenizer, never from a checkpoint."""
    assert all("token_set" not in key for key in LOSSES[name]().state_dict())
    assert math.isfinite(getattr(LOSSES[name](), "weight", 1.0))

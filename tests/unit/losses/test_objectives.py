"""SFT, preference losses and the answer score on batches: which tokens count, what normalises them, what is left out."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.config import AnswerScoreConfig, ORPOConfig, SFTConfig
from calibtrain.errors import UserError
from calibtrain.losses import (
    ANSWER,
    CHOSEN,
    REJECTED,
    AnswerScoreLoss,
    DPOLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    SFTLoss,
    SimPOLoss,
    build_loss,
    mean_loss,
)
from tests.unit.losses.batches import Example, make_batch

LOSSES = {
    "sft-token": SFTLoss(),
    "sft-sequence": SFTLoss(nll_norm="sequence"),
    "sft-full": SFTLoss(nll_scope="full"),
    "orpo": ORPOLoss(beta=0.3),
    "orpo-full-sequence": ORPOLoss(nll_scope="full", nll_norm="sequence"),
    "dpo": DPOLoss(beta=0.3, label_smoothing=0.1),
    "ipo": IPOLoss(beta=0.3),
    "simpo": SimPOLoss(),
    "kto": KTOLoss(beta=0.3, desirable_weight=1.2),
    "answer-log": AnswerScoreLoss(weight=2.0),
    "answer-brier": AnswerScoreLoss(score="brier"),
}
MIXED = [
    Example(CHOSEN, 0, [-0.5, -0.25], [-1.0, -2.0]),
    Example(REJECTED, 0, [-9.0], [-3.0, -1.0]),
    Example(CHOSEN, -1, [-1.0], [-4.0]),
    Example(ANSWER, -1, [-7.0], [-0.5, -0.25], 1.0),
    Example(ANSWER, -1, [], [-1.5], 0.0),
]


def made(examples, dtype=torch.float64):
    """A batch with reference log-probs, a function of each token's own, and a reference point."""
    stats, batch, leaf = make_batch(examples, dtype)
    reference = 0.9 * leaf.detach() - 0.1
    return stats, replace(batch, reference_logprob=reference, reference_point=torch.tensor(0.3, dtype=dtype)), leaf


def totals(loss, examples):
    stats, batch, leaf = made(examples)
    terms = loss(stats, batch)
    return {name: (term.total.item(), term.count.item()) for name, term in terms.items()}, terms, leaf, batch


@pytest.mark.parametrize(
    ("loss", "total", "count"),
    [
        (SFTLoss(), 7.0, 3),
        (SFTLoss(nll_scope="full"), 8.75, 6),
        (SFTLoss(nll_norm="sequence"), 1.5 + 4.0, 2),
        (SFTLoss(nll_scope="full", nll_norm="sequence"), 3.75 / 4 + 2.5, 2),
    ],
)
def test_sft_by_hand(loss, total, count):
    assert totals(loss, MIXED)[0] == {"nll": (pytest.approx(total), count)}


def test_the_likelihood_of_an_answer_is_that_behind_its_reasoning():
    stats, batch, leaf = make_batch(MIXED)
    read = torch.ones_like(batch.is_completion)
    read[-2] = False  # the second token of the graded answer of two
    term = AnswerScoreLoss(score="brier")(stats, replace(batch, is_answer=read))["answer_score"]
    assert term.total.item() == pytest.approx((math.exp(-0.5) - 1) ** 2 + math.exp(-1.5) ** 2)
    assert term.count == 2
    assert torch.autograd.grad(term.total, leaf)[0][-2] == 0


def test_orpo_by_hand():
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (-1.5, -2.0)]
    expected = math.log1p(odds[1] / odds[0])
    result, terms, _, _ = totals(ORPOLoss(beta=0.3), MIXED)
    assert result == {"nll": (pytest.approx(7.0), 3), "odds_ratio": (pytest.approx(expected), 1)}
    assert {name: term.weight for name, term in terms.items()} == {"nll": 1.0, "odds_ratio": 0.3}
    assert mean_loss(terms).item() == pytest.approx(7.0 / 3 + 0.3 * expected)


@pytest.mark.parametrize(
    ("loss", "name", "expected"),
    [
        # Log ratios are .1 log p + .1 a token: -.1 of the chosen completion, -.2 of the rejected one, 2 tokens each.
        (DPOLoss(beta=3.0), "dpo", math.log1p(math.exp(-3.0 * 0.1))),
        (IPOLoss(beta=5.0), "ipo", (0.05 - 0.1) ** 2),
        (SimPOLoss(beta=2.0, gamma=0.5), "simpo", math.log1p(math.exp(0.5 - 2.0 * 0.5))),
    ],
)
def test_preferences_by_hand(loss, name, expected):
    assert totals(loss, MIXED)[0] == {name: (pytest.approx(expected), 1)}


def test_kto_by_hand():
    """Three answers without pairs: two desirable ones of log ratio -.1 and -.3, one undesirable of -.2; z0 is .3."""
    value = {h: 1 / (1 + math.exp(-2.0 * (h - 0.3))) for h in (-0.1, -0.3, -0.2)}
    expected = 1.5 * (1 - value[-0.1]) + 1.5 * (1 - value[-0.3]) + value[-0.2]
    assert totals(KTOLoss(beta=2.0, desirable_weight=1.5), MIXED)[0] == {"kto": (pytest.approx(expected), 3)}


def test_what_has_no_reference_is_left_out_and_what_needs_one_says_so():
    stats, batch, _ = made(MIXED)
    partly = replace(batch, reference_logprob=torch.where(torch.arange(len(batch.targets)) == 2, torch.nan, -1.0))
    assert {name: int(LOSSES[name].counts(partly)[name]) for name in ("dpo", "ipo", "kto")} == {
        "dpo": 0,
        "ipo": 0,
        "kto": 2,
    }
    for name in ("dpo", "ipo", "kto"):
        term = LOSSES[name](stats, partly)[name]
        assert term.total.isfinite()
        assert (term.total == 0) == (name != "kto")
        without = replace(batch, reference_logprob=None)
        assert LOSSES[name].counts(without)[name] == 0
        with pytest.raises(UserError, match="no reference log-probs"):
            LOSSES[name](stats, without)
    with pytest.raises(UserError, match="no reference point"):
        KTOLoss()(stats, replace(batch, reference_point=None))
    empty = make_batch([])
    assert all(term.total == 0 for name in ("dpo", "kto") for term in LOSSES[name](*empty[:2]).values())


def test_answer_score_by_hand():
    right, wrong = math.exp(-0.75), math.exp(-1.5)
    log = -math.log(right) - math.log(1 - wrong)
    assert totals(AnswerScoreLoss(), MIXED)[0] == {"answer_score": (pytest.approx(log), 2)}
    brier = (1 - right) ** 2 + wrong**2
    assert totals(AnswerScoreLoss(score="brier"), MIXED)[0] == {"answer_score": (pytest.approx(brier), 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_counts_come_from_the_data_alone(name):
    result, terms, _, batch = totals(LOSSES[name], MIXED)
    counts = LOSSES[name].counts(batch)
    assert {key: count.item() for key, count in counts.items()} == {key: count for key, (_, count) in result.items()}
    for key, term in terms.items():
        assert term.count.dtype == counts[key].dtype == torch.int64
        assert term.total.shape == term.count.shape == ()


@pytest.mark.parametrize(
    ("examples", "complete"),
    [
        ([], 0),
        ([Example(CHOSEN, 0, [], [-1.0])], 0),
        ([Example(REJECTED, 0, [], [-1.0])], 0),
        ([Example(CHOSEN, 0, [-1.0], []), Example(REJECTED, 0, [], [-1.0])], 0),
        ([Example(CHOSEN, 0, [], [-1.0]), Example(REJECTED, 0, [-1.0], [])], 0),
        ([Example(CHOSEN, 0, [], []), Example(REJECTED, 0, [], [])], 0),
        ([Example(CHOSEN, 0, [], [-1.0]), Example(CHOSEN, 0, [], [-1.0]), Example(REJECTED, 0, [], [-1.0])], 0),
        ([Example(CHOSEN, 0, [], [-1.0]), Example(CHOSEN, 1, [], [-1.0]), Example(REJECTED, 1, [], [-2.0])], 1),
    ],
)
@pytest.mark.parametrize("name", ["orpo", "dpo", "ipo", "simpo"])
def test_incomplete_pairs_are_left_out(name, examples, complete):
    result, terms, leaf, _ = totals(LOSSES[name], examples)
    total, count = result["odds_ratio" if name == "orpo" else name]
    assert count == complete
    assert math.isfinite(total)
    assert (total == 0.0) == (complete == 0)
    loss = mean_loss(terms)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_other_roles_cannot_touch_the_loss(name):
    """NaN in the sequences a loss does not read changes neither its value nor its gradients."""
    read = {ANSWER} if name.startswith("answer") else {CHOSEN} if name.startswith("sft") else {CHOSEN, REJECTED}
    nan = float("nan")
    poisoned = [
        e if e.role in read else e._replace(prompt_logprobs=[nan] * len(e.prompt_logprobs),
                                            completion_logprobs=[nan] * len(e.completion_logprobs))
        for e in MIXED
    ]  # fmt: skip
    clean, poisoned = (totals(LOSSES[name], examples) for examples in (MIXED, poisoned))
    assert clean[0] == poisoned[0]
    gradients = [torch.autograd.grad(mean_loss(terms), leaf)[0] for _, terms, leaf, _ in (clean, poisoned)]
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > 0


def test_ungraded_and_empty_answers_are_left_out():
    examples = [
        Example(ANSWER, -1, [], [-1.0]),
        Example(ANSWER, -1, [-1.0], [], 1.0),
        Example(ANSWER, -1, [], [-1.0], 1.0),
    ]
    result, terms, leaf, _ = totals(AnswerScoreLoss(), examples)
    assert result == {"answer_score": (pytest.approx(1.0), 1)}
    mean_loss(terms).backward()
    assert leaf.grad.tolist() == [0.0, 0.0, -1.0]


def random_examples(seed: int) -> list[list[Example]]:
    """Groups that must stay in one micro-batch: pairs, lone sequences and graded answers of uneven lengths."""
    rng = random.Random(seed)

    def logprobs(most: int) -> list[float]:
        return [-rng.expovariate(1.0) for _ in range(rng.randint(0, most))]

    groups = [[Example(role, k, logprobs(3), logprobs(6)) for role in (CHOSEN, REJECTED)] for k in range(12)]
    groups += [[Example(CHOSEN, -1, logprobs(3), logprobs(6))] for _ in range(3)]
    groups += [[Example(ANSWER, -1, logprobs(3), logprobs(4), float(rng.random() < 0.5))] for _ in range(9)]
    return groups


def window_gradients(loss, groups, parts):
    """Sum over `parts` micro-batches with the window's counts, as gradients by log-prob value (values are distinct)."""
    micro = [[e for group in groups[i::parts] for e in group] for i in range(parts)]
    batches = [made(examples) for examples in micro]
    counts: dict[str, int] = {}
    for _, batch, _ in batches:
        for name, count in loss.counts(batch).items():
            counts[name] = counts.get(name, 0) + int(count)
    gradients, value = {}, 0.0
    for stats, batch, leaf in batches:
        total = sum(t.weight * t.total / max(1, counts[name]) for name, t in loss(stats, batch).items())
        total.backward()
        value += total.item()
        gradients.update(zip(leaf.tolist(), leaf.grad.tolist(), strict=True))
    return value, gradients


@pytest.mark.parametrize("name", LOSSES)
def test_global_normalisation_does_not_see_micro_batches(name):
    groups = random_examples(3)
    value, gradients = window_gradients(LOSSES[name], groups, 1)
    assert any(gradients.values())
    for parts in (2, 4, 8):
        order = random.Random(parts).sample(groups, len(groups))
        other_value, other = window_gradients(LOSSES[name], order, parts)
        assert other_value == pytest.approx(value, rel=1e-12)
        assert other == pytest.approx(gradients, rel=1e-11, abs=1e-14)


edge_logprobs = st.lists(st.sampled_from([0.0, -1e-12, -1e-8, -1e-3, -0.7, -30.0, -1000.0]), max_size=3)
examples_strategy = st.lists(
    st.builds(
        Example,
        st.sampled_from([CHOSEN, REJECTED, ANSWER]),
        st.integers(-1, 2),
        edge_logprobs,
        edge_logprobs,
        st.sampled_from([0.0, 1.0, float("nan")]),
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(examples_strategy, st.sampled_from(sorted(LOSSES)))
def test_finite_at_the_edges(examples, name):
    stats, batch, leaf = made(examples, torch.float32)
    terms = LOSSES[name](stats, batch)
    loss = mean_loss(terms)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is None or leaf.grad.isfinite().all()


def test_built_from_configs():
    orpo = build_loss(ORPOConfig(beta=0.25, nll_scope="full", nll_norm="sequence"))
    assert (orpo.name, orpo.beta, orpo.nll_scope, orpo.nll_norm) == ("orpo", 0.25, "full", "sequence")
    sft = build_loss(SFTConfig(nll_norm="sequence"))
    assert (sft.name, sft.nll_scope, sft.nll_norm) == ("sft", "completion", "sequence")
    penalty = build_loss(AnswerScoreConfig(weight=0.5, score="brier"))
    assert (penalty.name, penalty.weight, penalty.score) == ("answer_score", 0.5, "brier")
    for loss, config in ((orpo, ORPOConfig), (sft, SFTConfig), (penalty, AnswerScoreConfig)):
        assert loss.name == config().name


def test_unknown_options():
    with pytest.raises(UserError, match="nll_scope"):
        SFTLoss(nll_scope="prompt")
    with pytest.raises(UserError, match="nll_norm"):
        ORPOLoss(nll_norm="batch")
    with pytest.raises(UserError, match="score"):
        AnswerScoreLoss(score="linear")

"""What finds nothing to learn from says so: at once where it never can, once where a step may be empty by chance."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import calibtrain.losses as losses
from calibtrain.config import RunConfig
from calibtrain.data.encode import Encoded
from calibtrain.errors import UserError
from calibtrain.losses import (
    ANSWER,
    CHOSEN,
    OBJECTIVES,
    PENALTIES,
    CalibrationAwareLoss,
    FocalLoss,
    GRPOLoss,
    LabelSmoothingLoss,
    LossTerm,
    MMCELoss,
    ORPOLoss,
    RefusalTuningLoss,
    RewardModelLoss,
    SFTLoss,
    batch_from_labels,
    causal_lm_loss,
    global_counts,
    mean_loss,
    silence,
)  # fmt: skip
from calibtrain.losses.advantages import grpo_advantages, rloo_advantages
from calibtrain.losses.calibration_aware import isotonic_fit
from calibtrain.losses.rewards import calibrated_reward
from calibtrain.losses.rotation_step import DenseMatrix
from calibtrain.losses.silence import PATIENCE, READS, _named, check_learns
from calibtrain.losses.terms import REJECTED
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.training.losses import check_learns as check_run_learns
from tests.tiny import tiny_model
from tests.unit.losses.batches import Example, make_batch

TOKENS = {"label_smoothing": [5, 6], "idk": [5], "tokenized_brier": [5, 6, 7], "correctness_query": [5, 6]}
FROM_LABELS = {"sft", "orpo", "focal", "label_smoothing", "idk", "refusal", "token_brier", "confidence_penalty"}


def every_loss():
    for name, kind in {**OBJECTIVES, **PENALTIES}.items():
        yield name, kind(**({"token_set": TOKENS[name]} if name in TOKENS else {}))


def labelled(labels=None):
    ids = torch.arange(3, 11).view(2, 4)
    return {"input_ids": ids, "labels": ids.clone() if labels is None else torch.full_like(ids, labels)}


@pytest.fixture(autouse=True)
def forget():
    _named.clear()


@pytest.mark.parametrize(("name", "loss"), every_loss())
def test_every_loss_on_labels_that_teach_it_nothing(name, loss):
    with pytest.raises(UserError, match="every label is -100"):
        causal_lm_loss(tiny_model(), loss, **labelled(-100))
    if name in FROM_LABELS:
        assert causal_lm_loss(tiny_model(), loss, **labelled()) != 0
        return
    with pytest.raises(UserError, match="nothing that it could learn from") as refused:
        causal_lm_loss(tiny_model(), loss, **labelled())
    terms = loss.counts(batch_from_labels(**labelled()))
    assert all(f"{term} reads {READS[term]}" in str(refused.value) for term in terms)


@pytest.mark.parametrize(
    ("loss", "missing"), [(ORPOLoss(), "odds_ratio"), (RefusalTuningLoss(), "nll_refusal")], ids=str
)
def test_a_term_that_labels_cannot_teach_is_told_once(loss, missing, caplog):
    for _ in range(2):
        causal_lm_loss(tiny_model(), loss, **labelled())
    (message,) = [one.message for one in caplog.records]
    assert f"nothing for {missing}: {missing} reads " in message


class Rare(nn.Module):
    """A loss of one's own that finds something now and then."""

    name = "rare"

    def counts(self, batch):
        return {"rare": (batch.targets == 5).sum()}

    def forward(self, stats, batch):
        return {"rare": LossTerm(-stats.logprob[batch.targets == 5].sum(), self.counts(batch)["rare"])}


def test_a_loss_of_ones_own_may_be_empty_and_is_told_of(caplog):
    ids = torch.full((1, 4), 9)
    loss = Rare()
    for _ in range(2):
        assert causal_lm_loss(tiny_model(), loss, ids, ids) == 0
    assert [one.message for one in caplog.records if "labels alone" in one.message] == [
        "rare: a batch of labels alone has nothing for rare: rare reads what its counts(batch) says"
    ]
    check_learns(loss, batch_from_labels(**labelled()))


def test_an_empty_step_and_a_term_that_never_comes(caplog):
    full, empty = (batch_from_labels(**labelled(one)) for one in (None, -100))
    loss = ORPOLoss()
    for _ in range(PATIENCE - 1):
        global_counts(loss, [full, empty])
    assert not caplog.records
    global_counts(loss, [full])
    assert "odds_ratio has found nothing in 20 steps" in caplog.text
    for _ in range(2):
        global_counts(loss, [empty, empty])
    assert caplog.text.count("an optimiser step found nothing to learn from") == 1
    assert len(caplog.records) == 2
    other = SFTLoss()  # one that found something before is not complained about, but for an empty step
    global_counts(other, [full])
    for _ in range(PATIENCE):
        global_counts(other, [empty])
    assert len(caplog.records) == 3


def test_an_empty_micro_batch_of_a_mean_is_told_once(caplog):
    stats, batch, _ = make_batch([Example(REJECTED, 0, [], [-1.0])])
    for _ in range(2):
        assert mean_loss(FocalLoss()(stats, batch)) == 0
    assert [one.message.partition(":")[0] for one in caplog.records] == [
        "a micro-batch found nothing to learn from, and its loss is 0"
    ]


def test_other_ranks_than_the_first_are_silent(caplog, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    stats, batch, _ = make_batch([Example(REJECTED, 0, [], [-1.0])])
    mean_loss(FocalLoss()(stats, batch))
    assert not caplog.records


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_advantages_that_stay_zero(name, caplog):
    stats, batch, _ = make_batch([Example(ANSWER, -1, [], [-1.0, -2.0])])
    batch = replace(batch, advantages=torch.zeros(2, dtype=torch.float64))
    loss, learning = OBJECTIVES[name](), OBJECTIVES[name]()
    learning(stats, replace(batch, advantages=batch.advantages + 1))
    for _ in range(PATIENCE):
        loss(stats, batch)
        learning(stats, batch)
    (message,) = [one.message for one in caplog.records]
    assert message.startswith("advantages has found nothing in 20 steps")


def test_groups_that_compare_nothing(caplog):
    rewards, alone, group = torch.rand(4), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    for advantages in (grpo_advantages, rloo_advantages):
        with pytest.raises(UserError, match="alone in its group"):
            advantages(rewards, alone)
        assert advantages(rewards, group).any()
        assert advantages(rewards[:0], alone[:0]).shape == (0,)
    _named.clear()
    for _ in range(PATIENCE):
        grpo_advantages(torch.ones(4), group)
    assert "completions of one group that earn different rewards" in caplog.text
    with pytest.raises(UserError, match="every answer would earn 0"):
        calibrated_reward(rewards, rewards, accuracy_weight=0.0, score_weight=0.0)


def test_a_token_set_that_no_target_is_of(caplog):
    ids = torch.full((1, 6), 9)
    for _ in range(PATIENCE):
        causal_lm_loss(tiny_model(), loss := LabelSmoothingLoss(token_set=[5, 6]), ids, ids)
    assert not caplog.records  # each a loss of its own
    for _ in range(PATIENCE):
        causal_lm_loss(tiny_model(), loss, ids, ids)
    assert "smoothed has found nothing in 20 steps, and counts as 0: smoothed reads targets" in caplog.text


def test_a_bank_whose_steps_never_end(caplog):
    stats, batch, _ = make_batch([Example(ANSWER, -1, [], [-1.0], 1.0)])
    ended, forgotten = MMCELoss(), MMCELoss()
    for _ in range(70):
        ended(stats, batch)
        ended.after_step()
    assert not caplog.records
    for _ in range(140):
        forgotten(stats, batch)
    assert caplog.text.count("call the loss's after_step()") == 1


def test_a_fit_that_was_never_made(caplog):
    stats, batch, _ = make_batch([Example(ANSWER, -1, [], [-1.0], 1.0)])
    loss = CalibrationAwareLoss()
    with pytest.raises(UserError, match="call fit"):
        loss(stats, batch)
    loss.eval()(stats, batch)
    loss.train().fit(torch.zeros(0), torch.zeros(0))
    loss(stats, batch)
    assert caplog.text.count("no held-out answers") == 1
    with pytest.raises(UserError, match="got none"):
        isotonic_fit(torch.zeros(0), torch.zeros(0))


def test_matrices_that_cannot_drift():
    for matrix, cause in (
        (nn.Parameter(torch.zeros(4, 4)), "0 everywhere"),
        (nn.Parameter(torch.eye(4), requires_grad=False), "frozen"),
    ):
        with pytest.raises(UserError, match=cause):
            DenseMatrix.of("row_stretch", matrix)


@pytest.mark.parametrize(
    ("objective", "penalty", "role", "cause"),
    [
        (SFTLoss(), None, REJECTED, "sft: none of the 3 training examples has anything for nll"),
        (ORPOLoss(), None, CHOSEN, "orpo: none of the 3 training examples has anything for odds_ratio"),
        (SFTLoss(), losses.DivergenceAnchor(), CHOSEN, "divergence_anchor: none of the 3"),
        (SFTLoss(), MMCELoss(), CHOSEN, None),  # reads answers that come while training
        (RewardModelLoss(), None, CHOSEN, "reward_model: none"),
    ],
)
def test_a_run_that_could_learn_nothing_does_not_start(objective, penalty, role, cause):
    penalties = [] if penalty is None else [penalty]
    config = RunConfig.model_validate(
        {"penalties": [{"name": one.name} for one in penalties], "objective": {"name": "sft"}}
    )
    model = LossModel(Policy(tiny_model()), objective, penalties)
    examples = [(Encoded((3, 4, 5), 1, role, pair, pair),) for pair in range(3)]
    if cause is None:
        check_run_learns(config, model, examples)
        return
    with pytest.raises(UserError, match=cause):
        check_run_learns(config, model, examples)


def test_every_term_says_what_it_reads():
    batch = batch_from_labels(**labelled())
    names = {term for _, loss in every_loss() for term in loss.counts(batch)} | set(GRPOLoss(beta=0.1).counts(batch))
    assert names <= READS.keys()


def test_a_gpu_is_not_waited_for(caplog, monkeypatch):
    """The copy of a step's counts is read when it has arrived; steps in between are not looked at."""
    arrived = []
    monkeypatch.setattr(
        silence, "_on_its_way", lambda values: (values.clone(), SimpleNamespace(query=lambda: bool(arrived)))
    )
    watch, nothing = silence.Watch(), {"nll": torch.tensor(0)}
    for _ in range(5):
        watch.see(nothing, "a step")
    assert not caplog.records
    arrived.append(1)
    watch.see(nothing, "a step")
    assert caplog.text.count("a step found nothing to learn from") == 1

"""DPO, IPO, SimPO and KTO against TRL's trainers: the same hidden states and head, values and gradients."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from calibtrain.losses import (
    DPOLoss,
    IPOLoss,
    KTOLoss,
    SimPOLoss,
    batch_from_labels,
    dpo_loss,
    kto_reference_point,
    mean_loss,
)
from calibtrain.losses.log_ratios import log_ratios, reference_known
from calibtrain.losses.terms import CHOSEN, REJECTED
from calibtrain.ops import fused_linear_token_stats

pytestmark = pytest.mark.peer
PAIRS, WIDTH, PROMPT = 3, 9, 2
LENGTHS = torch.tensor([9, 5, 7, 6, 9, 4])  # of the rows, the chosen ones first
BETA = 0.3
WITHIN = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2)}  # values; gradients, of which the largest is 1


class Case:
    """Rows, what a model makes of them, and what a reference made of each token."""

    def __init__(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.table, self.weight = (
            (0.6 * torch.randn(40, 8, generator=generator)).to(dtype).requires_grad_() for _ in range(2)
        )
        self.ids = torch.randint(1, 40, (2 * PAIRS, WIDTH), generator=generator)
        place = torch.arange(WIDTH)
        self.mask = (place < LENGTHS[:, None]).long()
        self.completion = self.mask * (place >= PROMPT)
        self.labels = self.ids.masked_fill(self.completion == 0, -100)
        self.reference = -3 * torch.rand(self.ids.shape, generator=generator)  # of the token at each place

    def batch(self, pairs=True):
        """Our batch, its token statistics and reference log-probs."""
        batch = batch_from_labels(self.ids, self.labels, self.mask, pairs=pairs)
        rows, columns = batch.target_positions // WIDTH, batch.target_positions % WIDTH + 1
        batch = replace(batch, reference_logprob=self.reference[rows, columns])
        hidden = self.table[batch.input_ids].flatten(0, 1)[batch.target_positions]
        return fused_linear_token_stats(hidden, self.weight, batch.targets), batch

    @property
    def reference_sums(self):
        return (self.reference * self.completion).sum(1)

    def model(self, input_ids, labels, **_):
        """What TRL's trainers ask of a model with a fused head."""
        logits = self.table[input_ids].float() @ self.weight.float().t()
        read = labels[:, 1:] != -100
        found = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros(found.shape)
        return SimpleNamespace(
            log_probs=torch.where(read, found, 0.0), entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )


def trainer(kind, module="trl", **settings):
    """A trainer with what its loss reads and nothing of a training run."""
    trl = pytest.importorskip(module, reason="TRL's trainers are the oracles")
    made = object.__new__(getattr(trl, kind))
    made.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    made.model = SimpleNamespace(training=False)
    made._metrics = {"eval": defaultdict(list)}
    defaults = {"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0, "beta": BETA}
    for name, value in {**defaults, **settings}.items():
        setattr(made, name, value)
    return made


def assert_same(case, ours, theirs, dtype):
    value, gradient = WITHIN[dtype]
    torch.testing.assert_close(ours, theirs, rtol=value, atol=value)
    leaves = (case.table, case.weight)
    for one, other in zip(
        *(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)), strict=True
    ):
        assert other.count_nonzero() > 20
        scale = other.float().abs().max()
        torch.testing.assert_close(one.float() / scale, other.float() / scale, rtol=gradient, atol=gradient)


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize(("loss", "kind"), [(DPOLoss(beta=BETA), "sigmoid"), (IPOLoss(beta=BETA), "ipo")])
def test_dpo_and_ipo_equal_trl(loss, kind, dtype):
    case = Case(dtype)
    chosen, rejected = case.reference_sums.chunk(2)
    dpo = trainer(
        "DPOTrainer",
        loss_types=[kind],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=0.0,
    )
    inputs = {"input_ids": case.ids, "attention_mask": case.mask, "completion_mask": case.completion}
    theirs = dpo._compute_loss(
        case.model, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, False
    )
    stats, batch = case.batch()
    assert_same(case, mean_loss(loss(stats, batch)), theirs, dtype)


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_smoothed_dpo_equal_trls_cpo(smoothing, dtype):
    cpo = trainer(
        "CPOTrainer",
        "trl.experimental.cpo",
        loss_type="simpo",
        simpo_gamma=0.9,
        label_smoothing=smoothing,
        alpha=0.0,
        is_encoder_decoder=False,
    )
    case = Case(dtype)
    logits = case.table[case.ids].float() @ case.weight.float().t()
    theirs = cpo.cpo_loss(*cpo.get_batch_logps(logits, case.labels, average_log_prob=True).chunk(2))[0].mean()
    stats, batch = case.batch()
    ours = mean_loss(SimPOLoss(beta=BETA, gamma=0.9, label_smoothing=smoothing)(stats, batch))
    assert_same(case, ours, theirs, dtype)
    # TRL's DPO has no smoothing any more; CPO's logistic loss of log ratios is cDPO.
    cpo.loss_type = "sigmoid"
    ratios = cpo.get_batch_logps(logits, case.labels) - case.reference_sums
    theirs = cpo.cpo_loss(*ratios.chunk(2))[0].mean()
    stats, batch = case.batch()
    assert_same(case, mean_loss(DPOLoss(beta=BETA, label_smoothing=smoothing)(stats, batch)), theirs, dtype)
    leaf = ratios.detach()
    torch.testing.assert_close(
        dpo_loss(*leaf.chunk(2), beta=BETA, label_smoothing=smoothing), cpo.cpo_loss(*leaf.chunk(2))[0]
    )


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("shift", [0.0, 3.0])  # of the mismatched references: where z0 is clamped, and where it is not
def test_kto_equals_trl(shift, dtype):
    case, other = Case(dtype), Case(dtype, seed=1)
    other.table, other.weight = case.table, case.weight
    other.reference = other.reference - shift
    desirable = torch.tensor([True, False, True, True, False, False])
    kto = trainer("KTOTrainer", loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.6)
    inputs = {
        f"{key}{name}": value
        for key, one in (("", case), ("KL_", other))
        for name, value in (("input_ids", one.ids), ("attention_mask", one.mask), ("completion_mask", one.completion))
    }
    inputs |= {"label": desirable, "ref_logps": case.reference_sums, "ref_KL_logps": other.reference_sums}
    theirs = kto._compute_loss(case.model, inputs, False)
    stats, mismatched = other.batch(pairs=False)
    point = kto_reference_point(log_ratios(stats, mismatched, reference_known(mismatched)))
    assert (point == 0) == (shift == 0)
    stats, batch = case.batch(pairs=False)
    batch = replace(batch, roles=torch.where(desirable, CHOSEN, REJECTED), reference_point=point)
    ours = mean_loss(KTOLoss(beta=BETA, desirable_weight=1.3, undesirable_weight=0.6)(stats, batch))
    assert_same(case, ours, theirs, dtype)

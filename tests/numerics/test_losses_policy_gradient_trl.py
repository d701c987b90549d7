"""GRPO and RLOO against TRL's trainers, values and gradients: fresh and earlier samples, other samplers' ones, cut ones.

In bf16 ours is compared with TRL's loss of the same numbers in float32: it computes there whatever it is given.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections import defaultdict
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from calibtrain.losses.importance import importance_weights
from calibtrain.losses.policy_gradient import GRPOLoss, RLOOLoss
from calibtrain.losses.terms import mean_loss
from tests.numerics.test_losses_policy_gradient import LENGTHS, cut, rollout_batch

WIDTH = max(LENGTHS)


def trl_trainer(kind, **args):
    """A trainer with what its loss reads and nothing of a training run; it takes our log-probs as the model's."""
    trl = pytest.importorskip("trl", reason="TRL's trainers are the oracles")
    trainer = object.__new__(getattr(trl, kind))
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer.model = SimpleNamespace(training=False)
    trainer.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    trainer._metrics = {"eval": defaultdict(list)}
    settings = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "max_completion_length": 9,
        **args,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda model, *rest, **more: (model, torch.zeros_like(model), None)
    return trainer


def padded(values, batch, fill):
    """(S, T) rows of flat (N,) values."""
    rows = [values[batch.sequence_ids == s] for s in range(len(LENGTHS))]
    return torch.stack([torch.nn.functional.pad(row, (0, WIDTH - row.shape[0]), value=fill) for row in rows])


def trl_inputs(batch):
    mask = padded(torch.ones(batch.targets.shape[0]), batch, 0.0).long()
    per_sequence = torch.stack([batch.advantages[batch.sequence_ids == s][0] for s in range(len(LENGTHS))])
    old = padded(batch.old_logprob, batch, -1.0)
    return {
        "prompt_ids": torch.ones((len(LENGTHS), 1), dtype=torch.long),
        "prompt_mask": torch.ones((len(LENGTHS), 1), dtype=torch.long),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": per_sequence,
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": padded(batch.reference_logprob, batch, -1.0),
        "num_items_in_batch": mask.sum(),
    }


def lifted(stats, batch):
    """The same numbers in float32, from the same leaf."""
    changes = {one.name: getattr(batch, one.name) for one in fields(batch)}
    floating = {name: one.float() for name, one in changes.items() if one is not None and one.is_floating_point()}
    return stats.logprob.float(), replace(batch, **floating)


WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of gradients, which are as precise as the leaf that they belong to; values agree to 1e-6."""
dtypes = pytest.mark.parametrize("dtype", WITHIN)
LOSSES = [("grpo", "sequence", None), ("bnpo", "token", None), ("dapo", "token", None), ("dr_grpo", "constant", 9)]


def assert_same(ours, theirs, leaf):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, leaf, retain_graph=True)[0].float() for x in (ours, theirs)]
    assert gradients[1].count_nonzero() > 3
    torch.testing.assert_close(*gradients, rtol=WITHIN[leaf.dtype], atol=WITHIN[leaf.dtype] / 10)


@pytest.mark.peer
@dtypes
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize(("loss_type", "norm", "length"), LOSSES)
def test_grpo_equals_trl(loss_type, norm, length, beta, corrected, dtype):
    """TRL weighs the KL of an earlier policy's samples by their ratio, differentiated: ours is k3+, and the ratio data."""
    stats, batch = rollout_batch(dtype=dtype)
    logprob, whole = lifted(stats, batch)
    trainer = trl_trainer("GRPOTrainer", loss_type=loss_type, beta=beta)
    trainer.args.use_bias_correction_kl = corrected
    theirs = trainer._compute_loss(padded(logprob, whole, -1.0), trl_inputs(whole))
    kl = "k3+" if corrected else "k3"
    ours = mean_loss(GRPOLoss(norm=norm, length=length, clip_high=0.28, beta=beta, kl=kl)(stats, batch))
    assert_same(ours, theirs, stats.logprob)


@pytest.mark.peer
@dtypes
def test_rloo_equals_trl(dtype):
    stats, batch = rollout_batch(dtype=dtype)
    logprob, whole = lifted(stats, batch)
    theirs = trl_trainer("RLOOTrainer")._compute_loss(padded(logprob, whole, -1.0), trl_inputs(whole))
    assert_same(mean_loss(RLOOLoss(clip_high=0.28)(stats, batch)), theirs, stats.logprob)


@pytest.mark.peer
def test_dual_clip_equals_trls_delta():
    stats, batch = rollout_batch(dtype=torch.float32)
    batch = replace(batch, old_logprob=batch.old_logprob - 1.0)  # ratios around e, some of what is blamed beyond 2
    trainer = trl_trainer("GRPOTrainer", loss_type="dapo")
    trainer.args.delta = 2.0
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), trl_inputs(batch))
    ours = mean_loss(GRPOLoss(norm="token", clip_high=0.28, dual_clip=2.0)(stats, batch))
    assert ours != mean_loss(GRPOLoss(norm="token", clip_high=0.28)(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, stats.logprob)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def trl_ratio(trainer, old, sampled, mask):
    """TRL's own lines, which stand in the middle of a method that samples."""
    source = inspect.getsource(type(trainer)._generate_and_score_completions)
    start = source.index("per_token_logps_diff = (old")
    stop = source.index("# Compute the per-token log probabilities for the reference model")
    lines = source[source.rindex("\n", 0, start) + 1 : source.rindex("\n", 0, stop)]
    given = {"self": trainer, "old_per_token_logps": old, "sampling_per_token_logps": sampled, "mask": mask}
    exec(textwrap.dedent(lines), {"torch": torch, "math": math}, given)  # of the installed package
    return given["vllm_importance_sampling_ratio"]


@pytest.mark.peer
@dtypes
@pytest.mark.parametrize("how", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("loss_type", "norm", "length"), LOSSES)
def test_importance_correction_equals_trl(loss_type, norm, length, how, dtype):
    stats, batch = rollout_batch(dtype=dtype)
    noise = torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(7))
    sampled = (batch.old_logprob.float() + 0.4 * noise).to(dtype)
    sampled[4] = math.nan  # what a server could not score
    weights = importance_weights(batch.old_logprob, sampled, batch.sequence_ids, len(LENGTHS), how=how, cap=1.3)
    logprob, whole = lifted(stats, replace(batch, importance=weights))
    trainer = trl_trainer(
        "GRPOTrainer",
        loss_type=loss_type,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=how,
        vllm_importance_sampling_clip_max=1.3,
        vllm_importance_sampling_clip_min=None,
    )
    inputs = trl_inputs(whole)
    old = padded(whole.old_logprob, whole, -1.0)
    ratio = trl_ratio(trainer, old, padded(sampled.float(), whole, -1.0), inputs["completion_mask"])
    assert bool((ratio > 1.0).any())
    bounded = (ratio == 1.3) if how.endswith("truncate") else (ratio == 0.0)
    assert bool(bounded.any())
    inputs["importance_sampling_ratio"] = ratio
    theirs = trainer._compute_loss(padded(logprob, whole, -1.0), inputs)
    ours = mean_loss(GRPOLoss(norm=norm, length=length, clip_high=0.28)(stats, replace(batch, importance=weights)))
    assert not weights.requires_grad
    assert_same(ours, theirs, stats.logprob)


@pytest.mark.peer
@pytest.mark.parametrize(("loss_type", "norm", "counts"), [("dapo", "token", False), ("grpo", "sequence", True)])
def test_cut_answers_left_out_equal_trls_masked_ones(loss_type, norm, counts):
    """Where sequences are counted, TRL counts those that it masks as well, and ours does not."""
    stats, batch = rollout_batch(dtype=torch.float32)
    kept = [0, 1, 3, 5]
    inputs = trl_inputs(batch)
    for name in ("completion_mask", "completion_ids"):
        inputs[name] = inputs[name] * torch.tensor([i in kept for i in range(len(LENGTHS))])[:, None]
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    trainer = trl_trainer("GRPOTrainer", loss_type=loss_type)
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), inputs)
    ours = mean_loss(GRPOLoss(norm=norm, clip_high=0.28)(*cut(stats, batch, kept)))
    assert_same(ours, theirs * (len(LENGTHS) / len(kept) if counts else 1.0), stats.logprob)

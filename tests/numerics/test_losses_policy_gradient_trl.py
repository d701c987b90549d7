"""GRPO and RLOO against TRL's trainers, values and gradients."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from calibtrain.losses.policy_gradient import GRPOLoss, RLOOLoss
from calibtrain.losses.terms import mean_loss
from tests.numerics.test_losses_policy_gradient import LENGTHS, rollout_batch

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


@pytest.mark.peer
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "norm", "length"),
    [("grpo", "sequence", None), ("bnpo", "token", None), ("dapo", "token", None), ("dr_grpo", "constant", 9)],
)
def test_grpo_equals_trl(loss_type, norm, length, beta):
    stats, batch = rollout_batch(dtype=torch.float32)
    trainer = trl_trainer("GRPOTrainer", loss_type=loss_type, beta=beta)
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), trl_inputs(batch))
    ours = mean_loss(GRPOLoss(norm=norm, length=length, clip_high=0.28, beta=beta, kl="k3")(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, stats.logprob)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.peer
def test_rloo_equals_trl():
    stats, batch = rollout_batch(dtype=torch.float32)
    trainer = trl_trainer("RLOOTrainer")
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), trl_inputs(batch))
    ours = mean_loss(RLOOLoss(clip_high=0.28)(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, stats.logprob)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

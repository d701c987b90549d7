"""Half precision that comes in is lifted, not computed in: bf16 has 8 bits, and log-probs near 0 need more."""

from __future__ import annotations

import pytest
import torch

from calibtrain.losses import advantages, brier, calibration_aware, calibration_tuning, focal, kl, orpo, pooled

from calibtrain.losses import answer_score, idk, policy_gradient, reward_model, rewards, sft  # isort: skip
from calibtrain.losses import dpo, ipo, kto, simpo  # isort: skip

N = 24
MASK, IDS = torch.arange(N) % 5 > 0, torch.arange(N) // 6
GRADES = (torch.arange(N) % 3 == 0).float()
L, Q, Z = "log-probs", "probabilities", "any numbers"
FUNCTIONS = {
    "nll_token_sum": ((L,), lambda x: sft.nll_token_sum(x, MASK)),
    "nll_sequence_sum": ((L,), lambda x: sft.nll_sequence_sum(x, MASK, IDS, 4)),
    "orpo": ((L, L), lambda x, y: orpo.orpo_odds_ratio_loss(x, y, label_smoothing=0.1, cap=3.0)),
    "dpo": ((Z, Z), lambda x, y: dpo.dpo_loss(x, y, label_smoothing=0.1)),
    "ipo": ((Z, Z), ipo.ipo_loss),
    "simpo": ((L, L), simpo.simpo_loss),
    "kto": ((Z,), lambda x: kto.kto_loss(x, GRADES > 0, kto.kto_reference_point(x))),
    "token_brier": ((L, Q), brier.token_brier),
    "tokenized_brier": ((Z, Z), lambda x, y: brier.tokenized_brier(torch.stack([x, y], 1), GRADES)),
    "focal": ((L,), lambda x: focal.focal_loss(x, focal.sample_gamma(x))),
    "smoothed_nll": ((L, L), lambda x, y: focal.smoothed_nll(x, y[:, None], MASK, 0.1)),
    "idk": ((L, L, Q), lambda x, y, q: idk.idk_loss(x, y, q.clamp(min=0.875), MASK, regularized=True)),
    "answer_log": ((L,), lambda x: answer_score.answer_log_score(x, GRADES)),
    "answer_brier": ((L,), lambda x: answer_score.answer_brier_score(x, GRADES)),
    "query": ((Z, Z), lambda x, y: calibration_tuning.correctness_query_loss(torch.stack([x, y], 1), GRADES)),
    "jensen_shannon": ((L, L), lambda x, y: calibration_tuning.jensen_shannon(x[:, None], y[:, None])),
    "token_divergence": ((L, L), calibration_tuning.token_divergence),
    "calibration_aware": ((Q,), lambda x: calibration_aware.calibration_aware_score(x, GRADES)),
    "mmce": ((Q,), lambda x: pooled.mmce_squared(x, GRADES)),
    "soft_binned_ece": ((Q,), lambda x: pooled.soft_binned_ece_squared(x, GRADES)),
    **{f"kl_{name}": ((L, L), function) for name, function in kl.KL_ESTIMATORS.items()},
    "policy": ((L, L, Z), policy_gradient.clipped_policy_loss),
    "value": ((Z, Z, Z), policy_gradient.clipped_value_loss),
    "bradley_terry": ((Z, Z), reward_model.bradley_terry_loss),
    "centering": ((Z, Z), reward_model.centering_loss),
    "ppo_m": ((Z, Z, Z, Z), reward_model.ppo_m_loss),
    "plackett_luce": ((Z, Z, Z), lambda *x: reward_model.plackett_luce_loss(torch.stack(x, 1))),
    "pair_probability": ((Z,), lambda x: reward_model.pair_probability(x, 0.7)),
    "proper_brier": ((Q,), lambda x: rewards.proper_score(x, GRADES)),
    "proper_log": ((Q,), lambda x: rewards.proper_score(x, GRADES, score="log")),
    "ppo_c": ((Z, Q), lambda r, q: rewards.ppo_c_reward(r, q, 0.1)),
    "ppo_c_proper": ((Z, Q), lambda r, q: rewards.ppo_c_proper_reward(r, q, 0.1, scale=0.5)),
    "gae": ((Z, Z), lambda r, v: advantages.generalized_advantages(r.detach(), v, MASK, IDS)[0]),
    "whiten": ((Z,), lambda x: advantages.whiten(x, MASK)),
}


def drawn(kinds):
    """bf16 numbers of each kind, 0 and 1 among the probabilities."""
    generator = torch.Generator().manual_seed(len(kinds))
    made = []
    for kind in kinds:
        x = torch.randn(N, generator=generator)
        made.append({L: -x.square().clamp(max=9.0) * 0.3, Q: x.sigmoid().round(decimals=1), Z: x}[kind].bfloat16())
    return made


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bf16_gives_what_its_numbers_give_in_float32(name):
    kinds, function = FUNCTIONS[name]
    half = [one.requires_grad_() for one in drawn(kinds)]
    wide = [one.detach().float().requires_grad_() for one in half]
    ours, expected = function(*half), function(*wide)
    assert ours.dtype == expected.dtype
    assert ours.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    if not expected.requires_grad:
        return
    gradients = (
        torch.autograd.grad(one.sum(), leaves, allow_unused=True) for one, leaves in ((ours, half), (expected, wide))
    )
    for actual, wanted in zip(*gradients, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(actual, wanted.bfloat16(), rtol=0.02, atol=1e-3)


def test_where_computing_in_bf16_would_be_wrong():
    """log(1 - exp(x)) at -0.0123 is -4.404, and in bf16 -4.437; a KL of nearby policies would be 0 or noise."""
    x = torch.tensor([-0.0123])
    lossy = torch.log1p(-torch.exp(x.bfloat16())).float()
    exact = torch.log1p(-torch.exp(x.bfloat16().double())).float()
    assert abs(lossy - exact) > 0.01
    torch.testing.assert_close(answer_score.answer_log_score(x.bfloat16(), torch.zeros(1)), -exact, rtol=1e-5, atol=0)

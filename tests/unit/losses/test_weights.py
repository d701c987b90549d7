"""A record of weight w counts as if it stood w times in the step, however the step is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses import SFTLoss
from calibtrain.losses.terms import CHOSEN, global_counts, mean_loss, normalized_loss
from calibtrain.models.policy import Policy
from tests.tiny import tiny_model

ROWS = [
    Encoded((5, 9, 30, 31, 1), 2, CHOSEN, 0),
    # Two answers, and a question between them.
    Encoded((7, 8, 9, 10, 44, 1), 2, CHOSEN, 1, labels=(9, -100, -100, 1)),
    Encoded((6, 21, 1), 1, CHOSEN, 2),
]


def loss_and_gradient(loss, rows, packing=None, cuts=1):
    policy = Policy(tiny_model())
    batches = [collate(rows[i::cuts], 2, loss.nll_scope, packing) for i in range(cuts)]
    counts = global_counts(loss, batches)
    value = 0.0
    for batch in batches:
        stats = policy.token_stats(policy.hidden_at_targets(batch), batch.targets)
        value = value + normalized_loss(loss(stats, batch), counts)
    value.backward()
    return value.detach(), torch.cat([one.grad.flatten() for one in policy.causal_model.parameters()])


@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("scope", ["completion", "full"])
@pytest.mark.parametrize(("packing", "cuts"), [(None, 1), (16, 1), (None, 3)])
def test_weight_2_is_the_row_twice(norm, scope, packing, cuts):
    loss = SFTLoss(nll_scope=scope, nll_norm=norm)
    twice = loss_and_gradient(loss, [ROWS[0], ROWS[1], ROWS[1], ROWS[2]])
    weighed = [ROWS[0], replace(ROWS[1], weight=2.0), ROWS[2]]
    found = loss_and_gradient(loss, weighed, packing, cuts)
    for one, other in zip(found, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # Only ratios matter, also where all weights of a step together are less than 1.
    small = loss_and_gradient(loss, [replace(one, weight=one.weight / 1024) for one in weighed], packing, cuts)
    torch.testing.assert_close(small[1], found[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(loss_and_gradient(loss, ROWS)[1], found[1], rtol=1e-3, atol=1e-5)


def test_several_answers_of_a_row_have_the_log_probs_of_a_row_each():
    policy = Policy(tiny_model())
    ids = ROWS[1].ids
    apart = [Encoded(ids[:3], 2, CHOSEN, 0), Encoded((*ids[:5], 1), 5, CHOSEN, 0)]

    def logprobs(rows, packing=None):
        batch = collate(rows, 2, packing_tokens=packing)
        return policy.token_stats(policy.hidden_at_targets(batch), batch.targets).logprob.detach()

    for packing in (None, 16):
        torch.testing.assert_close(logprobs([ROWS[1]], packing), logprobs(apart, packing), rtol=1e-5, atol=1e-6)
    batch = collate([ROWS[1]], 2)
    stats = policy.token_stats(policy.hidden_at_targets(batch), batch.targets)
    torch.testing.assert_close(
        mean_loss(SFTLoss()(stats, batch)).detach(), -logprobs(apart).mean(), rtol=1e-5, atol=1e-6
    )

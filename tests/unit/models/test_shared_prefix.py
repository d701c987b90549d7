"""One prompt pass for both answers of a pair gives the log-probs and gradients of separate rows."""

from __future__ import annotations

import pytest
import torch

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from calibtrain.models.policy import Policy
from tests.tiny import tiny_model


def sequences() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 400, (count,), generator=generator).tolist())

    encoded = []
    for pair, (prompt_length, chosen, rejected) in enumerate([(5, 3, 2), (7, 1, 4), (2, 2, 2)]):
        prompt = ids(prompt_length)
        encoded.append(Encoded((*prompt, *ids(chosen)), prompt_length, CHOSEN, pair, pair))
        encoded.append(Encoded((*prompt, *ids(rejected)), prompt_length, REJECTED, pair, pair))
    encoded.append(Encoded((*ids(4), *ids(3)), 4, ANSWER, 9, correct=1.0))
    encoded.append(Encoded((*ids(4), *ids(5)), 4, CHOSEN, 10, labels=(5, -100, -100, 7, 8)))  # a conversation
    return encoded


def logprobs_and_gradient(model, scope: str, **layout) -> tuple[torch.Tensor, torch.Tensor]:
    policy = Policy(model)
    model.zero_grad()
    batch = collate(sequences(), 0, scope, **layout)
    logprob = policy.token_stats(policy.hidden_at_targets(batch), batch.targets).logprob
    logprob.square().sum().backward()
    return logprob.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("scope", ["completion", "full"])
@pytest.mark.parametrize("packing", [None, 20, 40])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_separate_rows(scope: str, packing: int | None, attention: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    logprob, gradient = logprobs_and_gradient(model, scope)
    shared, shared_gradient = logprobs_and_gradient(model, scope, packing_tokens=packing, shared_prefix=True)
    torch.testing.assert_close(shared, logprob, rtol=1e-6, atol=1e-6)
    assert (shared_gradient - gradient).abs().max() <= 2e-6 * gradient.abs().max()


def test_one_prompt_pass_for_each_pair() -> None:
    shared, separate = collate(sequences(), 0, shared_prefix=True), collate(sequences(), 0)
    assert shared.input_ids.shape[0] == 5
    assert int((shared.segment_ids > 0).sum()) < int((separate.segment_ids > 0).sum())
    assert shared.targets.equal(separate.targets)
    assert shared.sequence_ids.equal(separate.sequence_ids)

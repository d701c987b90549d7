"""Log-probs under the model as it is now, kept with the sequences: a frozen reference that costs nothing a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.models.policy import Policy


@torch.no_grad()
def with_reference_logprobs(
    policy: Policy, encoded: Sequence[Encoded], pad_id: int, *, batch_size: int = 16
) -> list[Encoded]:
    """The sequences with the log-prob of each completion token under `policy`, for `divergence_anchor`.

    Call it before training, or before deepspeed.initialize under ZeRO-3, with dropout off for the time being.
    """
    device = next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    found: list[Encoded] = []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        batch = collate(part, pad_id).to(device)
        logprob = policy.token_stats(policy.hidden_at_targets(batch), batch.targets).logprob[batch.is_completion].cpu()
        values = logprob.split([one.completion_length for one in part])
        found += [replace(one, reference_logprobs=tuple(row.tolist())) for one, row in zip(part, values, strict=True)]
    policy.train(was_training)
    return found

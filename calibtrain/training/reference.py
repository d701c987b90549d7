"""Log-probs under the model as it is now, kept with the sequences: a frozen reference that costs nothing a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.terms import CHOSEN, Batch
from calibtrain.models.policy import Policy


@torch.no_grad()
def with_reference_logprobs(
    policy: Policy,
    encoded: Sequence[Encoded],
    pad_id: int,
    *,
    batch_size: int = 16,
    within: Callable[[Callable[[], Tensor]], Tensor] = lambda call: call(),
    passes: int | None = None,
) -> list[Encoded]:
    """The sequences with the log-prob of each completion token under `policy`, for `divergence_anchor`.

    Call it before training; dropout is off for the time being. Of weights in parts every rank must make as many `passes`,
    each `within` the engine's forward.
    """
    device = next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    found: list[Encoded] = []
    for number in range(-(-len(encoded) // batch_size) if passes is None else passes):
        part = encoded[number * batch_size : (number + 1) * batch_size]
        batch = collate(part or [Encoded((0, 0), 1, CHOSEN, 0)], pad_id).to(device)

        def measure(batch: Batch = batch) -> Tensor:
            return policy.token_stats(policy.hidden_at_targets(batch), batch.targets).logprob

        logprob = within(measure)[batch.is_completion].cpu()
        values = logprob[: sum(one.completion_length for one in part)].split([one.completion_length for one in part])
        found += [replace(one, reference_logprobs=tuple(row.tolist())) for one, row in zip(part, values, strict=True)]
    policy.train(was_training)
    return found

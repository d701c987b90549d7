"""How the rows of a run's batches are laid out: what the config wants, where the model's attention allows it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.terms import CHOSEN, REJECTED
from calibtrain.models.attention_mask import block_mask_obstacle
from calibtrain.models.policy import Policy

logger = logging.getLogger(__name__)


def row_layout(config: RunConfig, policy: Policy) -> dict[str, Any]:
    """What the Trainer does with rows: `packing_tokens` and `shared_prefix`, as the config wants them.

    A model whose attention takes no block masks gets one sequence a row, and a message says so.
    """
    shares = config.data.shared_prefix and (config.objective.name == "orpo" or config.trains_on_rollouts)
    wanted = {"packing_tokens": config.data.packing_tokens, "shared_prefix": shares}
    if not any(wanted.values()):
        return wanted
    obstacle = block_mask_obstacle(policy.causal_model, config.data.max_length) or block_mask_failure(policy)
    if obstacle is None:
        return wanted
    logger.info("each sequence gets a row and passes its prompt itself: %s", obstacle)
    return {"packing_tokens": None, "shared_prefix": False}


@torch.no_grad()
def block_mask_failure(policy: Policy) -> str | None:
    """Try the mask on a few tokens: what the model gives packed must be what it gives alone. None if it is.

    This finds models whose config does not tell: recurrent layers, ALiBi, positions of their own.
    """
    model = policy.causal_model
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = [(7 * i + i * i) % vocabulary for i in range(1, 40)]
    encoded = [
        Encoded((*ids[start : start + 5], *ids[end : end + 4]), 5, role, pair, pair)
        for start, pair in ((0, 0), (10, 1))
        for role, end in ((CHOSEN, start + 20), (REJECTED, start + 25))
    ]
    device = next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    try:
        alone, packed = (
            policy.hidden_at_targets(collate(encoded, 0, packing_tokens=tokens, shared_prefix=bool(tokens)).to(device))
            for tokens in (None, 64)
        )
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} takes no block masks ({str(error).splitlines()[0]})"
    finally:
        policy.train(was_training)
    tolerance = 1e-3 if alone.dtype == torch.float32 else 0.1
    distance = ((packed - alone).float().norm() / alone.float().norm()).item()
    return None if distance < tolerance else f"{type(model).__name__} does not keep packed sequences apart"

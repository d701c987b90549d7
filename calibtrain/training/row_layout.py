"""How the rows of a run's batches are laid out: what the config wants, where the model's attention allows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.isolation import changed_tokens, has_experts, keeps_apart, quietly
from calibtrain.losses.terms import CHOSEN, REJECTED
from calibtrain.models.attention_mask import block_mask_obstacle, takes_lengths
from calibtrain.models.policy import Policy
from calibtrain.models.sharding import full_shape

logger = logging.getLogger(__name__)


def row_layout(config: RunConfig, policy: Policy) -> dict[str, Any]:
    """What the Trainer does with rows: `packing_tokens` and `shared_prefix`, as the config wants them.

    A model whose attention takes no block masks gets one sequence a row, and a message says so. Of weights in parts, call it
    within the engine's forward (`Call`).
    """
    wanted = {"packing_tokens": config.packing_tokens, "shared_prefix": config.shares_prompts}
    if not any(wanted.values()):
        return wanted
    obstacle = block_mask_obstacle(policy.causal_model, config.data.max_length) or block_mask_failure(policy)
    if obstacle is None:
        return wanted
    logger.info("each sequence gets a row and passes its prompt itself: %s", obstacle)
    return {"packing_tokens": None, "shared_prefix": False}


def block_mask_failure(policy: Policy) -> str | None:
    """Try the mask on a few tokens: what the model gives packed must be what it gives alone. None if it is.

    This finds models whose config does not tell: recurrent layers, ALiBi, positions of their own.
    """
    model = policy.causal_model
    vocabulary = full_shape(model.get_output_embeddings().weight)[0]
    ids = [(7 * i + i * i) % vocabulary for i in range(1, 40)]
    others = changed_tokens(torch.tensor(ids), vocabulary).tolist()
    encoded, changed = _two_pairs(ids, ids), _two_pairs(ids, others)
    device, shares = next(policy.parameters()).device, not takes_lengths(model)
    # Two rows where lengths are told: transformers itself finds the sequences of a single one.
    width = 64 if shares else 24
    alone, packed, packed_changed = (
        collate(sequences, 0, packing_tokens=tokens, shared_prefix=shares and tokens is not None).to(device)
        for sequences, tokens in ((encoded, None), (encoded, width), (changed, width))
    )
    watched, experts = alone.sequence_ids == len(encoded) - 1, has_experts(model.config.get_text_config())
    try:
        with quietly(policy.modules(), device):
            apart = keeps_apart(
                policy.hidden_at_targets,
                alone,
                (packed, packed_changed),
                watched,
                dtype=next(policy.parameters()).dtype,
                experts=experts,
            )
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} cannot be told of packed rows ({str(error).splitlines()[0]})"
    return None if apart else f"{type(model).__name__} does not keep packed sequences apart"


def _two_pairs(ids: Sequence[int], others: Sequence[int]) -> list[Encoded]:
    """Two pairs of completions of `ids`; all but the last one, and the prompt it shares, take theirs from `others`."""
    return [
        Encoded((*prompts[start : start + 5], *answers[end : end + 4]), 5, role, pair, pair)
        for pair, role, prompts, start, answers, end in (
            (0, CHOSEN, others, 0, others, 20),
            (0, REJECTED, others, 0, others, 25),
            (1, CHOSEN, ids, 10, others, 30),
            (1, REJECTED, ids, 10, ids, 35),
        )
    ]

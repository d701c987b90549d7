"""Which positions of a batch see which, in the form that the model's attention takes.

Rows that hold one sequence, padded on the right, need no mask of ours: causal attention never looks at what follows.
Packed and shared-prefix rows do, and it stands in place of the model's own; a model with a rule of its own that such a
mask would put out of force (a sliding window, chunks, recurrent layers, ALiBi) is recognised by `block_mask_obstacle`.

FlashAttention takes no mask: it is told how long each sequence is, and within each keeps
the model's own window. Of completions that share a prompt it cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibtrain.attention_names import attention_of, told_by_length
from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch, row_lengths
from calibtrain.models import cpu_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", cpu_attention.NAME)
"""Attention implementations of transformers that take a mask as it is handed to them."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window", "local_attention")
"""Where configs keep how far back a token sees, in tokens; a window that no sequence outgrows is no rule."""


def visibility(batch: Batch) -> Callable[[Any, Any, Any, Any], Any]:
    """The rule (row, head, query, key) -> visible: earlier tokens of the same segment, but not of another branch.

    A prompt (branch 0) is seen by all branches of its segment. Padding sees padding: a query without any key is NaN.
    It is a FlexAttention mask_mod; with index tensors that broadcast against each other it gives the dense mask.
    """
    segments, branches = batch.segment_ids, batch.branch_ids
    if branches is None:
        branches = torch.zeros_like(segments)

    def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        same_segment = segments[row, query] == segments[row, key]
        same_branch = (branches[row, key] == 0) | (branches[row, query] == branches[row, key])
        return same_segment & same_branch & (key <= query)

    return visible


def attention_inputs(batch: Batch, model: Any) -> dict[str, Any]:
    """What a model's forward is given beside the tokens, so that the sequences of a row do not see each other.

    Nothing where each row holds one: the model counts positions itself, and padding on the right is behind every target.
    Raises UserError for rows that the model's attention cannot be told of.
    """
    if not takes_lengths(model):
        mask = attention_mask(batch, model)
        return {} if mask is None else {"attention_mask": mask, "position_ids": batch.position_ids}
    if not batch.packed:
        return {}
    _check_obstacle(batch, model)
    return {"position_ids": batch.position_ids, **row_lengths(batch)}


def takes_lengths(model: Any) -> bool:
    """Whether the model's attention is told of a row's sequences by their lengths."""
    return told_by_length(attention_of(model))


def attention_mask(batch: Batch, model: Any) -> Tensor | BlockMask | None:
    """What blocks the sequences of a row from each other; None where each row holds a single sequence.

    (R, 1, T, T) additive in the model's dtype for SDPA and eager attention, a BlockMask for FlexAttention. Raises
    UserError for rows of several sequences with a model that does not take such masks.
    """
    if not batch.packed:
        return None
    if takes_lengths(model):
        raise UserError(f"{attention_of(model)} takes no block masks; see attention_inputs")
    _check_obstacle(batch, model)
    rows, width = batch.input_ids.shape
    visible, device = visibility(batch), batch.input_ids.device
    if model.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        # Compiled, the blocks are found without ever holding (R, T, T).
        return create_block_mask(visible, rows, None, width, width, device=device, _compile=device.type == "cuda")
    row, position = torch.arange(rows, device=device), torch.arange(width, device=device)
    allowed = visible(row[:, None, None], None, position[:, None], position)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _check_obstacle(batch: Batch, model: Any) -> None:
    width = batch.input_ids.shape[1]
    # The longest sequence is read from the device only where the row itself outgrows a window.
    obstacle = block_mask_obstacle(model, width) and block_mask_obstacle(model, int(batch.position_ids.max()) + 1)
    if obstacle:
        raise UserError(f"{obstacle}: set data.packing_tokens to null and data.shared_prefix to false")


def block_mask_obstacle(model: Any, longest: int) -> str | None:
    """Why sequences of up to `longest` tokens may not lie in one row, told to the model by us; None if they may."""
    config = model.config.get_text_config()
    if takes_lengths(model):
        return rule_of_its_own(config, longest, within=("sliding_window",))
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"the attention of {config.model_type} ({config._attn_implementation}) takes no block masks"
    return rule_of_its_own(config, longest)


def rule_of_its_own(config: Any, longest: int, within: tuple[str, ...] = ()) -> str | None:
    """What beside causality says which positions see which in sequences of up to `longest` tokens; None if nothing does.

    Windows of `within` are kept by the attention itself.
    """
    name = f"the attention of {config.model_type}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers of the kind {', '.join(sorted(kinds))}, which block masks do not reach"
    for key in (one for one in WINDOWS if one not in within):
        window = getattr(config, key, None)
        if isinstance(window, int) and 0 < window < longest:
            return f"{name} has a window ({key}) of {window} tokens, less than the {longest} of the longest sequence"
    return None

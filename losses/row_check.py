"""Refuse rows whose sequences a model would let see each other, before it learns from them.

A packed row reaches a Hugging Face model as `position_ids` that restart; many models and attention implementations do not
look at them; FlashAttention is told besides where each begins. Padding on the left is the same kind: positions that count
it, or a recurrent state carried over it. Each is tried on a few tokens, once a model (`calibtrain.losses.isolation`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from calibtrain.attention_names import attention_of, told_by_length
from calibtrain.errors import UserError
from calibtrain.losses.isolation import changed_tokens, has_experts, head_forward, keeps_apart, leaks, quietly
from calibtrain.losses.label_batch import batch_from_labels
from calibtrain.losses.terms import Batch, row_lengths

ROW, ROWS, LEFT = "a packed row", "packed rows", "padding on the left"
GIVEN, ALONE = "packed rows with inputs of their maker's", "the same with one sequence a row"
LENGTH, SEQUENCES = 6, 3  # of the tried row
MASK = "attention_mask=calibtrain.models.attention_mask.attention_mask(batch, model)"
_found: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model as its trainer holds it, the Hugging Face model inside and that one's head."""

    called: nn.Module
    causal_model: Any
    head: nn.Linear

    @property
    def config(self) -> Any:
        """Of the language model, in models that see or hear as well."""
        config = self.causal_model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def attention(self) -> str:
        """Name of the attention implementation."""
        return attention_of(self.causal_model)

    @property
    def dtype(self) -> torch.dtype:
        """In which products are made."""
        device = self.head.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.weight.dtype

    @property
    def vocabulary(self) -> int:
        """Number of tokens; sharded weights do not tell."""
        return int(getattr(self.config, "vocab_size", None) or self.head.out_features)

    @property
    def sharded(self) -> bool:
        """Whether every forward pass is collective because each rank holds a part of the weights (ZeRO-3, FSDP)."""
        if any("FullyShardedDataParallel" in type(module).__name__ for module in self.called.modules()):
            return True
        return any(hasattr(one, "ds_id") or hasattr(one, "_local_tensor") for one in self.called.parameters())

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the head is given, (R, T, H)."""
        called, found = self.called, []
        # Neither synchronises buffers nor compiles anew for a few tokens. Sharded weights need the whole wrapper.
        while type(called).__name__ in ("DistributedDataParallel", "OptimizedModule"):
            called = called.module if hasattr(called, "module") else called._orig_mod  # type: ignore[assignment]

        def keep(hidden: Tensor) -> Tensor:
            found.append(hidden)
            return hidden[..., :1]

        with head_forward(self.head, keep):
            called(**inputs)
        return found[0]


def row_inputs(batch: Batch, causal_model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a Hugging Face model's forward takes: the batch, and `inputs`, which go before what the batch says.

    Without a mask, transformers finds packed sequences by their positions: with FlashAttention in a single row, so that it
    is told their lengths.
    """
    own: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.packed:
        lengths = row_lengths(batch) if told_by_length(attention_of(causal_model)) else {}
        return {**own, "position_ids": batch.position_ids, **lengths, **inputs}
    own["attention_mask"] = (batch.segment_ids > 0).long()
    # Some models would count the padding on the left; where images are given as well, positions are the model's affair.
    if not _given(inputs) and "position_ids" in inspect.signature(causal_model.forward).parameters:
        own["position_ids"] = batch.position_ids
    return {**own, **inputs}


def _given(inputs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that are no plain values."""
    return sorted(name for name, value in inputs.items() if not isinstance(value, bool | int | float | str | None))


def check_rows(model: CheckedModel, batch: Batch, inputs: Mapping[str, Any]) -> None:
    """Raise UserError where `model` would let sequences of `batch` see each other, or padding before them.

    `inputs` is what its forward is given beside the batch. Tried once for each attention implementation, dtype and layout
    of a model, with dropout off. Where passes are collective, all layouts are tried at the first call, so that every rank
    makes as many, however its own rows are laid out.
    """
    if torch.compiler.is_compiling():
        return
    given = _given(inputs)
    if given:
        layout = GIVEN if batch.packed else ALONE
    else:
        layout = LEFT if not batch.packed else ROW if batch.input_ids.shape[0] == 1 else ROWS
    known = _found.setdefault(model.causal_model, {})
    key = (model.attention, model.dtype, *sorted(inputs))
    if batch.packed and "attention_mask" not in given:
        _check_expressible(model, batch, first=(layout, *key) not in known)
    if (layout, *key) not in known:
        tried = (layout,) if not model.sharded else (GIVEN,) if given else (ROW, ROWS, LEFT)
        with quietly(model.causal_model.modules(), batch.input_ids.device):
            for one in tried:
                known[(one, *key)] = None if one == ALONE else _fault(model, one, batch, inputs)
        known.setdefault((layout, *key), None)
    fault = known[(layout, *key)]
    if fault and (layout != LEFT or bool(((batch.segment_ids[:, 0] == 0) & (batch.segment_ids[:, -1] > 0)).any())):
        raise UserError(fault)


def _check_expressible(model: CheckedModel, batch: Batch, *, first: bool) -> None:
    """What restarting positions cannot say, however well the model reads them."""
    width, chunk = batch.input_ids.shape[1], getattr(model.config, "attention_chunk_size", None)
    if isinstance(chunk, int) and width > chunk:
        raise UserError(
            f"{type(model.causal_model).__name__} cuts its attention into chunks of {chunk} tokens from the start of the "
            f"row, in the middle of sequences: pack rows of at most {chunk} tokens, not {width}"
        )
    on_host = batch.input_ids.device.type == "cpu"  # a GPU is waited for once
    if (first or on_host) and batch.branch_ids is not None and bool((batch.branch_ids > 0).any()):
        other = "take another attention" if told_by_length(model.attention) else f"give {MASK}"
        raise UserError(
            "the batch's completions share their prompts, which position_ids cannot tell a model; pass each prompt with "
            f"each completion, or {other}"
        )


def _fault(model: CheckedModel, layout: str, batch: Batch, inputs: Mapping[str, Any]) -> str | None:
    """Why `layout` is not for this model; None where it is."""
    name = f"{type(model.causal_model).__name__} with {model.attention} attention"
    if layout == GIVEN:
        apart: bool | None = _given_keeps_apart(model, batch, inputs)  # also by a rank whose rows are not packed
        if apart or not batch.packed:
            return None
        return (
            f"{name} lets the sequences of a packed row see each other, also with {', '.join(sorted(inputs))}: give one "
            "sequence a row"
        )
    if layout == LEFT:
        if _keeps_apart(model, layout, inputs) is not False:
            return None
        return (
            f"{name} does not read a sequence behind padding as it reads it alone: pad on the right "
            "(tokenizer.padding_side = 'right')"
        )
    apart = _keeps_apart(model, layout, inputs)
    if apart:
        return None
    ways = ["one sequence a row"]
    if layout == ROWS and _keeps_apart(model, ROW, inputs):
        ways.append("batches of one packed row")
    if model.attention not in ("eager", "sdpa"):
        ways.append("another attention (model.set_attn_implementation('sdpa'), or 'eager')")
    if _keeps_apart(model, layout, inputs, masked=True):
        ways.append(f"{MASK} beside them")
    does = "does not take restarting position_ids" if apart is None else "lets the sequences see each other"
    return f"{layout}: {name} {does}, and would learn from what does not belong together: give {', or '.join(ways)}"


def _keeps_apart(model: CheckedModel, layout: str, inputs: Mapping[str, Any], *, masked: bool = False) -> bool | None:
    """Whether a few sequences in `layout` are read as alone; None where the model fails on them."""

    def states(batch: Batch) -> Tensor:
        mask = {"attention_mask": _block_mask(batch, model.head.weight.dtype)} if masked and batch.packed else {}
        hidden = model.hidden(row_inputs(batch, model.causal_model, {**inputs, **mask}))
        return hidden.flatten(0, 1)[batch.target_positions]

    alone, together, watched = _tried(layout, model.vocabulary, model.head.weight.device)
    try:
        return keeps_apart(states, alone, together, watched, dtype=model.dtype, experts=has_experts(model.config))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None


def _given_keeps_apart(model: CheckedModel, batch: Batch, inputs: Mapping[str, Any]) -> bool:
    """The same of the batch itself, where only its maker knows how the model is told of its sequences."""
    rest = row_inputs(batch, model.causal_model, inputs)

    def states(ids: Tensor) -> Tensor:
        return model.hidden({**rest, "input_ids": ids})

    return not leaks(states, batch, model.vocabulary, dtype=model.dtype, experts=has_experts(model.config))


def _tried(layout: str, vocabulary: int, device: torch.device) -> tuple[Batch, tuple[Batch, Batch], Tensor]:
    """Sequences alone; in `layout`, as they are and with others in place of all but the last of each row; those targets."""
    rows = 2 if layout == ROWS else 1
    number = torch.arange(1, rows * SEQUENCES * LENGTH + 1, device=device)
    ids = ((7 * number + number**2) % vocabulary).view(-1, LENGTH)
    last = torch.arange(ids.shape[0], device=device)[:, None] % SEQUENCES == SEQUENCES - 1
    both = ids, torch.where(last, ids, changed_tokens(ids, vocabulary))
    alone = batch_from_labels(ids, ids)
    watched = last[alone.sequence_ids, 0]
    if layout == LEFT:
        both = tuple(torch.cat([torch.zeros_like(one), one], 1) for one in both)  # type: ignore[assignment]
        mask = (torch.arange(2 * LENGTH, device=device) >= LENGTH).long().expand(ids.shape[0], -1)
        return alone, (batch_from_labels(both[0], both[0], mask), batch_from_labels(both[1], both[1], mask)), watched
    positions = torch.arange(LENGTH, device=device).repeat(rows, SEQUENCES)
    first, second = (batch_from_labels(one, one, None, positions) for one in (one.view(rows, -1) for one in both))
    return alone, (first, second), watched


def _block_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """(R, 1, T, T), additive: each sequence sees what came before in it."""
    segments, width = batch.segment_ids, batch.segment_ids.shape[1]
    allowed = (segments[:, :, None] == segments[:, None]) & segments.new_ones((width, width), dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

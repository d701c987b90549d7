"""From a Hugging Face causal language model and its batch with labels to TokenStats and Batch, in anybody's trainer.

The logits of a batch are never held: the model runs as its trainer wrapped it (DDP, DeepSpeed ZeRO 0 to 3), and its head
computes the statistics of the targets instead of logits. Nothing of transformers is imported.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch, LossTerms, Objective, mean_loss
from calibtrain.ops import TokenStats, fused_linear_token_stats, token_set_logprobs
from calibtrain.ops.head import head_of

IGNORED = -100
"""Label of a token that is no target, as in `torch.nn.functional.cross_entropy` and every Hugging Face collator."""

PROBED = 4  # target tokens whose fused log-probs are compared with the model's own logits, once a model


def causal_lm_loss(
    model: nn.Module,
    loss: Objective,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Loss of one micro-batch, in place of `model(**inputs).loss`: each term over its own count there. () float32.

    The arguments are those of `batch_from_labels` and `token_stats_from_model`. A mean over the micro-batch: where several
    make a step, `global_counts` and `normalized_loss` make the gradient independent of how the step is cut.
    """
    batch = batch_from_labels(input_ids, labels, attention_mask, position_ids)
    return mean_loss(loss_terms_from_model(model, loss, batch)[0])


def batch_from_labels(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    pairs: bool = False,
) -> Batch:
    """Batch of a collator's tensors, all (R, T): the targets are the labels that are not -100, not shifted.

    Args:
        input_ids: int64.
        labels: int64; `labels[r, t]` is predicted by the hidden state at t - 1. A sequence's first token is never a target.
        attention_mask: 0 on padding, on either side; None for none.
        position_ids: restart at 0 with each sequence of a packed row; None for one sequence a row.
        completion_mask: False for prompt tokens among the targets (for losses with nll_scope=full); None for none.
        pairs: the rows are the chosen completions followed by the rejected ones in the same order, as TRL's preference
            collators lay them out.

    Raises:
        UserError: shapes or dtypes do not fit, or `pairs` with an odd number of rows or packed ones.
    """
    _check_shapes(input_ids, labels, attention_mask, position_ids, completion_mask)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if position_ids is None:
        segments = real.int()
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
    else:
        segments = ((position_ids == 0) & real).cumsum(1).int() * real
    in_row = segments.amax(1).clamp(min=1).long()  # a row of padding is an empty sequence
    first = in_row.cumsum(0) - in_row
    predicted = (labels[:, 1:] != IGNORED) & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    rows, columns = predicted.nonzero(as_tuple=True)
    num_sequences = int(in_row.sum())
    roles, pair_ids = _roles(num_sequences, input_ids, pairs)
    is_completion = torch.ones_like(rows, dtype=torch.bool)
    if completion_mask is not None:
        is_completion = completion_mask[rows, columns + 1].bool()
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segments,
        target_positions=rows * input_ids.shape[1] + columns,
        targets=labels[rows, columns + 1],
        sequence_ids=first[rows] + segments[rows, columns + 1].long() - 1,
        is_completion=is_completion,
        roles=roles,
        pair_ids=pair_ids,
        correct=torch.full((num_sequences,), float("nan"), device=input_ids.device),
        record_ids=torch.arange(num_sequences, device=input_ids.device),
        branch_ids=torch.zeros_like(segments) if num_sequences > input_ids.shape[0] else None,
    )


def token_stats_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    batch: Batch,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenStats:
    """Statistics of the batch's targets from the last hidden states (R, T, H) and the head's weight (V, H).

    For backbones of your own; the head's options and the errors are those of `fused_linear_token_stats`.
    """
    if hidden.shape[:2] != batch.input_ids.shape:
        raise UserError(
            f"hidden states {tuple(hidden.shape)} do not belong to input_ids {tuple(batch.input_ids.shape)}: they must be "
            "(R, T, H) for all positions"
        )
    at_targets = hidden.flatten(0, 1)[batch.target_positions]
    return fused_linear_token_stats(
        at_targets, weight, batch.targets, bias=bias, softcap=softcap, logit_scale=logit_scale
    )


def token_stats_from_model(model: nn.Module, batch: Batch, **inputs: Any) -> TokenStats:
    """Statistics of the batch's targets under a Hugging Face causal language model, in one forward pass. (N,) each.

    Call it with the model as your trainer holds it: DDP, a DeepSpeed engine and PEFT's wrapper are looked through for the
    head, and called as they are, so that gradients are synchronised and parameters gathered as ever. Under autocast the
    head runs in autocast's dtype. The first call compares a few tokens with the model's own logits.

    Args:
        model: anything whose forward takes `input_ids` and that has `get_output_embeddings`, in whatever wrapper.
        batch: of `batch_from_labels`; its mask, or its positions where rows are packed, go to the model.
        inputs: what else the model's forward takes, or what it takes instead of these.

    Raises:
        UserError: the head is not linear, or the model does something to its logits that the fused head does not know.
    """
    return _through_head(model, batch, None, inputs)[0]


def loss_terms_from_model(
    model: nn.Module, loss: Objective, batch: Batch, **inputs: Any
) -> tuple[LossTerms, TokenStats]:
    """Terms of a loss, whether or not it has a `token_set`, and what `token_stats_from_model` gives: one forward pass.

    The arguments and errors are those of `token_stats_from_model`.
    """
    token_set: Tensor | None = getattr(loss, "token_set", None)
    stats, set_logprob = _through_head(model, batch, token_set, inputs)
    more: tuple[Tensor, ...] = () if token_set is None else (set_logprob,)
    return loss(stats, batch, *more), stats


def _through_head(
    model: nn.Module, batch: Batch, token_set: Tensor | None, inputs: dict[str, Any]
) -> tuple[TokenStats, Tensor]:
    """Statistics (N,) and log-probs (N, K) of a token set, made in the head's place during one forward pass."""
    causal_model = _causal_model(model)
    head = _linear_head(causal_model)
    options = asdict(head_of(causal_model.config))
    checked = getattr(causal_model, "_calibtrain_checked", False)
    found: list[TokenStats] = []
    outputs: list[Tensor] = []

    def statistics(hidden: Tensor) -> Tensor:
        """The head's forward during this call. What is differentiable leaves as its output, for ZeRO-3's hooks on it."""
        hidden, weight, bias = _in_one_dtype(hidden, head)
        stats = token_stats_from_hidden(hidden, weight, batch, bias=bias, **options)
        rows = [torch.stack(stats[:3])]
        if token_set is not None:
            at_targets = hidden.flatten(0, 1)[batch.target_positions]
            of_set = token_set_logprobs(
                at_targets, weight, batch.targets, stats.logprob, token_set, bias=bias, **options
            )
            rows.append(of_set.t())
        found.append(stats)
        probed = batch.target_positions[:0] if checked else batch.target_positions[:PROBED]
        probe = linear(hidden.detach().flatten(0, 1)[probed], weight.detach(), bias if bias is None else bias.detach())
        outputs.append(probe)
        return torch.cat(rows)

    def capture(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Take the statistics as the hooks before this one left them; the model goes on with the probed logits."""
        probe = outputs.pop()
        outputs.append(output)
        # DDP looks for used parameters in the graph of what the model returns: keep the statistics in it.
        return probe[None] + output.sum() * 0.0

    own_forward = head.__dict__.get("forward")
    handle = head.register_forward_hook(capture)
    head.forward = statistics  # type: ignore[method-assign]
    try:
        result = model(**{"input_ids": batch.input_ids, "use_cache": False, **_layout(batch), **inputs})
    finally:
        handle.remove()
        if own_forward is None:
            del head.forward
        else:
            head.forward = own_forward  # type: ignore[method-assign]
    if len(found) != 1 or len(outputs) != 1:
        raise UserError(
            f"{type(causal_model).__name__} called its head {len(found)} times in one forward pass, not once: its forward "
            "is replaced or compiled; give the plain model, or the hidden states to token_stats_from_hidden"
        )
    stats = TokenStats(*outputs[0][:3], found[0].confidence, found[0].correct)
    if not checked and stats.logprob.numel():
        _compare(stats.logprob, result.logits, batch.targets, causal_model)
        causal_model._calibtrain_checked = True
    return stats, outputs[0][3:].t()


def _check_shapes(input_ids: Tensor, labels: Tensor, *others: Tensor | None) -> None:
    if input_ids.ndim != 2 or labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise UserError(
            f"input_ids and labels must be (R, T) int64 alike, got {tuple(input_ids.shape)} {input_ids.dtype} and "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    for name, tensor in zip(("attention_mask", "position_ids", "completion_mask"), others, strict=True):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise UserError(f"{name} must be {tuple(input_ids.shape)} as input_ids, got {tuple(tensor.shape)}")


def _roles(num_sequences: int, input_ids: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Roles and pair ids, (S,) int64 each."""
    roles = torch.full((num_sequences,), CHOSEN, device=input_ids.device)
    if not pairs:
        return roles, torch.full_like(roles, -1)
    half, odd = divmod(num_sequences, 2)
    if odd or num_sequences != input_ids.shape[0]:
        raise UserError(
            f"pairs: {num_sequences} sequences in {input_ids.shape[0]} rows; there must be one a row, the chosen ones "
            "first and then as many rejected ones"
        )
    roles[half:] = REJECTED
    return roles, torch.arange(num_sequences, device=input_ids.device) % half


def _layout(batch: Batch) -> dict[str, Tensor]:
    """What tells the model where sequences are: without a mask, transformers finds packed ones by their positions."""
    if batch.packed:
        return {"position_ids": batch.position_ids}
    return {"attention_mask": (batch.segment_ids > 0).long()}


def _causal_model(model: nn.Module) -> Any:
    """The Hugging Face model inside DDP, a DeepSpeed engine, a compiled module or PEFT's wrapper."""
    inner: Any = model
    while name := next((name for name in ("module", "_orig_mod") if name in getattr(inner, "_modules", ())), None):
        inner = getattr(inner, name)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
        raise UserError(
            f"{type(inner).__name__} is no Hugging Face causal language model (no get_output_embeddings); give its hidden "
            "states to token_stats_from_hidden"
        )
    return inner


def _linear_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: the head is a {type(head).__name__}, and only a plain linear one can be fused; leave "
            "lm_head out of the adapters' target modules"
        )
    return head


def _in_one_dtype(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in the dtype in which the head itself would multiply them."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    return hidden.to(dtype), head.weight.to(dtype), head.bias if head.bias is None else head.bias.to(dtype)


@torch.no_grad()
def _compare(logprob: Tensor, logits: Tensor, targets: Tensor, model: Any) -> None:
    """Raises UserError where fused log-probs differ from those of the model's own logits (1, k, V)."""
    rows = logits[0].float()
    expected = rows.log_softmax(-1).gather(1, targets[: rows.shape[0], None])[:, 0]
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 0.1
    worst = (logprob[: rows.shape[0]].float() - expected).abs().max().item()
    if worst > tolerance * (1.0 + expected.abs().max().item()):
        raise UserError(
            f"the head of {type(model).__name__} is not supported: its log-probs differ from softmax(scale * hidden @ "
            f"weight.T) by {worst:.3g}; supported are linear heads with bias, final_logit_softcapping, logit_scale and "
            "logits_scaling"
        )

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
from calibtrain.losses.isolation import head_forward
from calibtrain.losses.label_batch import batch_from_labels
from calibtrain.losses.row_check import CheckedModel, check_rows, row_inputs
from calibtrain.losses.silence import check_learns
from calibtrain.losses.terms import Batch, LossTerms, Objective, mean_loss
from calibtrain.ops import TokenStats, fused_linear_token_stats, token_set_logprobs
from calibtrain.ops.head import head_of

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

    Raises UserError as those do, where there is no label to learn, and for a loss that labels alone can never teach (one
    that reads pairs, grades, roles or advantages).
    """
    batch = batch_from_labels(input_ids, labels, attention_mask, position_ids)
    check_learns(loss, batch)
    return mean_loss(loss_terms_from_model(model, loss, batch)[0])


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
        UserError: the head is not linear, or the model does something to its logits that the fused head does not know; or
            it lets the sequences of a packed row see each other, or does not look past padding on the left. That is tried
            with a few tokens, once for each of the model's attention implementations, and says what to give instead.
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

    check_rows(CheckedModel(model, causal_model, head), batch, inputs)
    handle = head.register_forward_hook(capture)
    try:
        with head_forward(head, statistics):
            result = model(**row_inputs(batch, causal_model, inputs))
    finally:
        handle.remove()
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

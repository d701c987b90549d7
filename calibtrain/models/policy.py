"""Policy: a causal language model seen as a backbone (hidden states) and a head (token statistics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch
from calibtrain.models.attention_mask import attention_inputs
from calibtrain.models.sharding import full_shape
from calibtrain.ops import TokenStats, answer_logprobs_at, fused_linear_token_stats, token_set_logprobs
from calibtrain.ops.head import Head, head_of


class HeadReader(nn.Module):
    """The language-model head as a matrix, for what is computed from it without all logits. It has no parameters.

    A module of its own, so that ZeRO-3 brings the head's weight for this call, and again for its backward: `start_engine`
    registers `parameters_read` with it. DeepSpeed by itself registers a weight that another module than its own reads only
    where it finds it sharded; one that a prefetch has just brought is read as it is, and gone when backward comes.
    """

    def __init__(self, find: Callable[[], Any], form: Head) -> None:
        super().__init__()
        self.find = find  # not the head itself, which would become a child and its weight a second name in checkpoints
        self.form = asdict(form)

    def parameters_read(self) -> list[nn.Parameter]:
        """The head's weight and, where it has one, its bias."""
        head = self.find()
        return [one for one in (head.weight, getattr(head, "bias", None)) if one is not None]

    def forward(self, hidden: Tensor, read: Callable[..., Any]) -> Any:
        """`read(hidden, weight, bias=..., softcap=..., logit_scale=...)`."""
        head = self.find()
        return read(hidden, head.weight, bias=getattr(head, "bias", None), **self.form)


def unwrapped(model: Any) -> Any:
    """The Hugging Face model, without a LoRA wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def states_at_targets(
    model: Any,
    backbone: Callable[..., Any],
    batch: Batch,
    layers: Sequence[int] = (),
    given: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of a model's `backbone` at `batch.target_positions`, in its dtype.

    Returns the final ones (N, H) and those of `layers` (N, layers, H); layer 0 is the embeddings, k follows block k.
    `given` beside the tokens, in place of what the batch's own rows ask for.
    """
    if given is None:
        given = attention_inputs(batch, model)
    more = {"output_hidden_states": True} if layers else {}
    output = backbone(input_ids=batch.input_ids, use_cache=False, **given, **more)
    hidden = output.last_hidden_state.flatten(0, 1)[batch.target_positions]
    found = [output.hidden_states[layer].flatten(0, 1)[batch.target_positions] for layer in layers]
    return hidden, torch.stack(found, dim=1) if found else hidden[:, None][:, :0]


class Policy(nn.Module):
    """A causal language model whose logits are only ever computed at target positions.

    `scale` multiplies final hidden states wherever a confidence is read, never in the task's loss. It is a plain number,
    not a parameter: the calibration term solves for it, and `calibtrain.models.export` folds it into the weights.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = head_of(model.config)
        self.reader = HeadReader(lambda: self.causal_model.get_output_embeddings(), self.head)
        self.scale = 1.0

    @property
    def causal_model(self) -> Any:
        """The Hugging Face model, without a LoRA wrapper."""
        return unwrapped(self.model)

    def backbone(self, **inputs: Any) -> Any:
        """The decoder's output, before the head."""
        return self.causal_model.base_model(**inputs)

    def hidden_at_targets(self, batch: Batch) -> Tensor:
        """Hidden states that predict the batch's targets. (N, H) in the model's dtype."""
        return self.states_at_targets(batch)[0]

    def states_at_targets(
        self, batch: Batch, layers: Sequence[int] = (), given: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and the states of `layers` there, (N, layers, H); layer 0 is the embeddings, k follows block k.

        `given`: what the backbone gets beside the tokens, where the batch's own rows do not say it.
        """
        return states_at_targets(self.model, self.backbone, batch, layers, given)

    def token_stats(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        """Statistics of `targets` (N,) from `hidden` (N, H)."""
        return self.reader(
            hidden, lambda states, weight, **form: fused_linear_token_stats(states, weight, targets, **form)
        )

    def token_set_logprobs(self, hidden: Tensor, targets: Tensor, stats: TokenStats, token_set: Tensor) -> Tensor:
        """Log-probs of the tokens of `token_set` (K,) at every target, (N, K); `stats` are those of the same targets."""

        def read(states: Tensor, weight: Tensor, **form: Any) -> Tensor:
            return token_set_logprobs(states, weight, targets, stats.logprob, token_set.to(states.device), **form)

        return self.reader(hidden, read)

    def answer_logprobs(self, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> Tensor:
        """Log-probs of `targets` (N,) at `temperatures` (K,) and the calibrated scale, (N, K); no gradient."""

        def read(states: Tensor, weight: Tensor, **form: Any) -> Tensor:
            return answer_logprobs_at(states, weight, targets, temperatures, **form)

        return self.reader(self.scaled(hidden), read)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a few positions, for choosing the next token. (n, H) to (n, V) float32."""
        z = self.causal_model.get_output_embeddings()(hidden).float() * self.head.logit_scale
        return z if self.head.softcap is None else self.head.softcap * torch.tanh(z / self.head.softcap)

    def scaled(self, hidden: Tensor) -> Tensor:
        """`hidden` times the calibrated scale, in its dtype."""
        return hidden if self.scale == 1.0 else hidden * self.scale


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Compare the policy's token statistics with the model's own logits on a few tokens.

    It runs where the model lies; of weights in parts, call it within the engine's forward (`Call`).

    Raises UserError when they differ: the model does something to its logits that the fused head does not know.
    """
    model = policy.causal_model
    output = model.get_output_embeddings()
    if output is None or getattr(output, "weight", None) is None:
        raise UserError(f"model.source: {type(model).__name__} has no linear language-model head")
    ids = torch.arange(1, 9, device=output.weight.device)[None] % full_shape(output.weight)[0]
    was_training = policy.training
    policy.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    hidden = policy.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    expected = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logprob = policy.token_stats(hidden, ids[0, 1:]).logprob.float()
    policy.train(was_training)
    tolerance = 1e-4 if output.weight.dtype == torch.float32 else 0.1
    if not torch.allclose(logprob, expected, atol=tolerance, rtol=tolerance):
        worst = (logprob - expected).abs().max().item()
        raise UserError(
            f"model.source: the head of {type(model).__name__} is not supported: its log-probs differ from "
            f"softmax(scale * hidden @ weight.T) by {worst:.3g}; supported are linear heads with bias, "
            "final_logit_softcapping, logit_scale and logits_scaling"
        )

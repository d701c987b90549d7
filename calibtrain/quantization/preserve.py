"""What rounding should not disturb: the model's own answers and the confidence that it has in them.

To second order the divergence KL(p || q) of the next token's distribution, and the square of the shift of an answer's
log-odds, are quadratic forms in the errors of a layer's outputs. Their diagonal over tokens says how much each token's
error counts: the squared gradient there (a Fisher information, as in GuidedQuant, Kim et al. 2025, arXiv 2505.07004,
which takes the gradient of a data set's loss). A token that no answer depends on may be rounded as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.ops.head import head_of
from calibtrain.quantization.blocks import Inputs, Text, batches_of, passed_through, run_block
from calibtrain.quantization.streaming import StreamedModel

Weights = Mapping[str, Sequence[Tensor]]
"""Of each layer, a weight (B, T) for the tokens of each batch; answers' positions weigh 1 on average."""


def token_weights(
    streamed: StreamedModel,
    layers: Mapping[str, nn.Module],
    texts: Sequence[Text],
    batches: Sequence[Inputs],
    *,
    log_odds: float = 1.0,
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """How much an error of a layer's output at each token disturbs the answers: E |d log p(y) / d output|^2, y ~ p.

    log_odds: weight of the squared gradient of the log-odds of the model's own answer, log P - log(1 - P), beside it.
    batches: `blocks.first_inputs` of the texts. Blocks come and go twice, forward and backward; what each reads is kept.
    """
    kept = [[batch.hidden for batch in batches]]
    for index in range(len(streamed.blocks)):
        block = streamed.bring(index)
        with torch.no_grad():
            pairs = zip(batches, kept[-1], strict=True)
            kept.append([run_block(block, index, batch.with_hidden(states)) for batch, states in pairs])
        streamed.drop(index)
    ids = [one for one, _, _ in batches_of(texts, streamed.pad_id)]
    cotangents = _answers_gradients(streamed, ids, batches, kept.pop(), seed)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for index in reversed(range(len(streamed.blocks))):
        block, inputs = streamed.bring(index), kept.pop()
        own = {name: one for name, one in layers.items() if name.startswith(f"{streamed.name_of(index)}.")}
        for number, batch in enumerate(batches):
            squares, cotangents[number] = _squares(
                block, index, batch.with_hidden(inputs[number]), own, cotangents[number]
            )
            for name, (divergence, odds) in squares.items():
                found[name].append(divergence + log_odds * odds)
        streamed.drop(index)
    return {name: _normalised(parts, batches) for name, parts in found.items()}


def _answers_gradients(
    streamed: StreamedModel, ids: Sequence[Tensor], batches: Sequence[Inputs], last: Sequence[Tensor], seed: int
) -> list[list[Tensor]]:
    """By batch, gradients at the last block's output (B, T, H): of -log p(y), y drawn from p, and of the log-odds."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tokens, batch, states in zip(ids, batches, last, strict=True):
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            tokens = tokens.to(states.device)
            logprobs = _logprobs(streamed.model, passed_through(streamed.model, tokens, states)[batch.predicts])
            drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator).to(states.device)
            losses = -logprobs.gather(1, drawn).sum(), _log_odds(logprobs, tokens, batch.predicts).sum()
            found.append([torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in losses])
    return found


def _logprobs(model: Any, hidden: Tensor) -> Tensor:
    """(n, H) to (n, V) float32."""
    form = head_of(model.config)
    logits = model.get_output_embeddings()(hidden).float() * form.logit_scale
    return (logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)).log_softmax(-1)


def _log_odds(logprobs: Tensor, ids: Tensor, predicts: Tensor) -> Tensor:
    """Log-odds of each row's whole answer (B,), from the log-probs (positions, V) at its places."""
    following = ids.roll(-1, 1)[predicts]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(predicts)[predicts]
    answer = logprobs.new_zeros(len(ids)).index_add(0, rows, logprobs.gather(1, following[:, None])[:, 0])
    answer = answer.clamp(max=-1e-3)  # beyond 99.9 % a difference is of no consequence, and 1 - P runs out of digits
    return answer - torch.log(-torch.expm1(answer))


def _squares(
    block: nn.Module, index: int, batch: Inputs, layers: Mapping[str, nn.Module], cotangents: Sequence[Tensor]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Squared gradients of layers' outputs, summed over outputs, (B, T) for each cotangent; and those of the inputs."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            made[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    states = batch.hidden.detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = run_block(block, index, batch.with_hidden(states))
    finally:
        for handle in handles:
            handle.remove()
    squares: dict[str, list[Tensor]] = {name: [] for name in layers}
    inner = []
    for cotangent in cotangents:
        gradients = torch.autograd.grad(output, [states, *made.values()], cotangent, retain_graph=True)
        inner.append(gradients[0])
        for name, gradient in zip(made, gradients[1:], strict=True):
            squares[name].append(gradient.float().square().sum(-1))
    return squares, inner


def _normalised(parts: list[Tensor], batches: Sequence[Inputs]) -> list[Tensor]:
    total = sum(float(part[batch.predicts].sum()) for part, batch in zip(parts, batches, strict=True))
    mean = total / sum(int(batch.predicts.sum()) for batch in batches)
    return [part / mean for part in parts] if mean > 0 else [torch.ones_like(part) for part in parts]

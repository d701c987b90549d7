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
from calibtrain.quantization.blocks import Text, batches_of

Weights = Mapping[str, Sequence[Tensor]]
"""Of each layer, a weight (B, T) for the tokens of each batch; answers' positions weigh 1 on average."""


def token_weights(
    model: Any,
    layers: Mapping[str, nn.Module],
    texts: Sequence[Text],
    pad_id: int,
    *,
    log_odds: float = 1.0,
    seed: int = 0,
    size: int = 32,
    on_batch: Callable[[int], None] = lambda texts_done: None,
) -> dict[str, list[Tensor]]:
    """How much an error of a layer's output at each token disturbs the answers: E |d log p(y) / d output|^2, y ~ p.

    log_odds: weight of the squared gradient of the log-odds of the model's own answer, log P - log(1 - P), beside it.
    Batches are those of `blocks.first_inputs` of the same texts and size. The model's own weights get no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    device = model.get_input_embeddings().weight.device
    for ids, _, predicts in batches_of(texts, pad_id, size):
        ids, predicts = ids.to(device), predicts.to(device)
        hidden, squares = _traced(model, layers, ids)
        logprobs = _logprobs(model, hidden[predicts])
        drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator).to(device)
        divergence = -logprobs.gather(1, drawn).sum()
        divergence.backward(retain_graph=log_odds > 0)
        totals = squares.take()
        if log_odds > 0:
            _log_odds(logprobs, ids, predicts).sum().backward()
            for name, more in squares.take().items():
                totals[name] += log_odds * more
        squares.remove()
        for name in layers:
            found[name].append(totals[name])
        on_batch(len(ids))
    return {name: _normalised(parts, texts, pad_id, size) for name, parts in found.items()}


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


class _Squares:
    """Sums over outputs of the squared gradients of layers' outputs, at each token."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.found: dict[str, Tensor] = {}
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in layers.items()]

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            self.found[name] = gradient.float().square().sum(-1)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(keep)

        return hook

    def take(self) -> dict[str, Tensor]:
        """What was summed since, by layer."""
        taken, self.found = self.found, {}
        return taken

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self.handles:
            handle.remove()


def _traced(model: Any, layers: Mapping[str, nn.Module], ids: Tensor) -> tuple[Tensor, _Squares]:
    squares = _Squares(layers)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state, squares


def _normalised(parts: list[Tensor], texts: Sequence[Text], pad_id: int, size: int) -> list[Tensor]:
    places = [
        predicts.to(part.device) for part, (_, _, predicts) in zip(parts, batches_of(texts, pad_id, size), strict=True)
    ]
    total = sum(float(part[place].sum()) for part, place in zip(parts, places, strict=True))
    mean = total / sum(int(place.sum()) for place in places)
    return [part / mean for part in parts] if mean > 0 else [torch.ones_like(part) for part in parts]

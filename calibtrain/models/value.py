"""A value model of its own beside the policy: its backbone and head, inside the one module that DeepSpeed wraps.

Of its backbone is trained what is trained of the policy's: all weights, or adapters of its own; the head always is. It is in
checkpoints, and never in an export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from calibtrain.config import ModelConfig, RunConfig
from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch
from calibtrain.models.loading import check_weights, load_model, load_settings, load_tokenizer
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy, states_at_targets, unwrapped
from calibtrain.models.reward import ScalarHead, scalar_head


class ValueModel(nn.Module):
    """Backbone and scalar head: the value of every state that predicts a target."""

    def __init__(self, model: Any, score: ScalarHead) -> None:
        super().__init__()
        self.model = model
        self.score = score

    def forward(self, batch: Batch) -> Tensor:
        """Values at `batch.target_positions`, (N,) in float32 or better."""
        hidden, _ = states_at_targets(self.model, unwrapped(self.model).base_model, batch)
        return self.score(hidden)[:, 0]


class OwnValueLossModel(LossModel):
    """LossModel whose values come from a model of their own: their loss does not move the policy."""

    def __init__(
        self, policy: Policy, value: ValueModel, objective: nn.Module, penalties: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__(policy, objective, penalties)
        self.value = value

    def scored(self, hidden: Tensor, batch: Batch) -> Batch:
        """The batch with the value at every target position, (N,) float32."""
        return replace(batch, scores=self.value(batch))


def value_config(config: RunConfig) -> ModelConfig:
    """How the value model is loaded: as the policy is, from `objective.value_source` where that is given."""
    source = getattr(config.objective, "value_source", None)
    if source is None:
        return config.model
    return config.model.model_copy(update={"source": str(source), "revision": None})


def check_value_source(config: RunConfig, tokenizer: Any) -> None:
    """Raise UserError, before any training, for a `value_source` that cannot read the policy's tokens."""
    settings = value_config(config)
    if settings is config.model:
        return
    name = f"objective.value_source: {settings.source}"
    if not isdir(expanduser(settings.source)):
        raise UserError(f"{name}: no such directory; it is a model's, e.g. the `model` of a reward model's run")
    try:
        check_weights(settings)
        theirs = load_tokenizer(settings).get_vocab()
    except UserError as error:
        raise UserError(str(error).replace("model.source", "objective.value_source")) from None
    other = [token for token, index in tokenizer.get_vocab().items() if theirs.get(token, index) != index]
    if other or len(theirs) < len(tokenizer):
        raise UserError(
            f"{name}: its tokenizer numbers tokens otherwise than the policy's; take a model of that family"
        )
    _source_head(settings)


def load_value_model(config: RunConfig, zero: dict[str, Any] | None = None) -> ValueModel:
    """The value model of a run, in the policy's dtype; a reward model's head is its first head, else it is drawn.

    `zero` as in `load_model`. Raises UserError where it cannot be loaded.
    """
    settings = value_config(config)
    found = None if settings is config.model else _source_head(settings)
    with nullcontext() if found is None else _without_report():
        model = load_model(settings, zero)
    causal = unwrapped(model)
    score = scalar_head(causal, config.seed)
    if found is not None:
        with torch.no_grad():
            score.weight.copy_(found)
    causal.set_output_embeddings(nn.Identity())  # no logit is read of it, and none of its weights trained
    return ValueModel(model, score)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from telling that a classifier's head is not the language model's: that is known, and meant."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _source_head(settings: ModelConfig) -> Tensor | None:
    """Weight (1, H) of a sequence classifier's head; None where the source is no classifier.

    Raises UserError for one with several labels.
    """
    kinds = getattr(load_settings(settings), "architectures", None) or [""]
    if not kinds[0].endswith("ForSequenceClassification"):
        return None
    for path in sorted(Path(expanduser(settings.source)).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                shape = file.get_slice(key).get_shape()
                if len(shape) == 2 and shape[0] == 1:
                    return file.get_tensor(key)
    raise UserError(
        f"objective.value_source: {settings.source} is a classifier of several labels, or not in safetensors; a value model "
        "starts from a reward model with one label, or from a language model"
    )

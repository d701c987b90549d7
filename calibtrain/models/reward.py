"""Models with a scalar head beside the language model's: the reward of a sequence, or the value of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.config import ModelConfig
from calibtrain.distributed import is_main_rank, wait_for_main
from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.models.arithmetic import torch_dtype
from calibtrain.models.export import empty_model, grow, merger, rows_of
from calibtrain.models.loading import load_settings
from calibtrain.models.loss_model import LossModel, StepStatistics, TrainStep, last_positions
from calibtrain.models.policy import Policy
from calibtrain.models.sharding import full_shape
from calibtrain.models.streamed_export import whole_weights, write_in_files
from calibtrain.ops import TokenStats, at_least_float32


class RewardLossModel(LossModel):
    """LossModel of a reward model: `score` reads the final hidden state of each sequence's last token.

    The vocabulary's head is not run, and not trained.
    """

    def __init__(self, policy: Policy, objective: nn.Module, seed: int = 0) -> None:
        super().__init__(policy, objective)
        self.score = scalar_head(policy.causal_model, seed)
        model = policy.causal_model
        head = model.get_output_embeddings()
        if head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(False)

    def _train(self, step: TrainStep) -> tuple[Tensor, StepStatistics]:
        batch = step.batch
        hidden = self.policy.hidden_at_targets(replace(batch, target_positions=last_positions(batch)))
        scores = self.score(hidden)[:, 0]
        owners = scores.detach()[batch.sequence_ids]
        # No token has a probability here: hooks see each sequence's score in its place, to find those that are not finite.
        stats = TokenStats(owners, owners, owners, owners, torch.zeros_like(owners, dtype=torch.bool))
        terms: dict[str, LossTerm] = {}
        for term in self._terms():
            terms.update(term(stats, replace(batch, scores=scores)))
        loss, output = self._normalized(step, terms, stats, scores)
        return loss, replace(output, batch=replace(batch, is_completion=torch.zeros_like(batch.is_completion)))


class ValueLossModel(LossModel):
    """LossModel with a value head, as PPO needs: `score` reads the hidden state that predicts each target token."""

    def __init__(
        self, policy: Policy, objective: nn.Module, penalties: Sequence[nn.Module] = (), seed: int = 0
    ) -> None:
        super().__init__(policy, objective, penalties)
        self.score = scalar_head(policy.causal_model, seed)

    def scored(self, hidden: Tensor, batch: Batch) -> Batch:
        """The batch with the value of every target token, (N,) float32."""
        return replace(batch, scores=self.score(hidden)[:, 0])


class ScalarHead(nn.Linear):
    """Linear map to one number without bias: the product is made and kept in float32, whatever the weights' dtype.

    Rewards and values in bfloat16 are a few hundred different numbers: pairs tie, and small advantages are noise.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` (N, H) to (N, 1) in float32 or better."""
        with torch.autocast(hidden.device.type, enabled=False):
            return at_least_float32(hidden) @ at_least_float32(self.weight).t()


def scalar_head(model: Any, seed: int) -> ScalarHead:
    """Linear map of a hidden state to one number, drawn alike on every rank, with the spread of TRL's reward models.

    `model`: the Hugging Face model whose states it reads.
    """
    weight = model.get_input_embeddings().weight
    size = full_shape(weight)[1]
    head = ScalarHead(size)
    draws = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(draws / (size + 1) ** 0.5)
    return head.to(weight.device, weight.dtype)


def padding_token(tokenizer: Any, end_id: int) -> str:
    """A token to pad with that is not the one that ends an answer.

    The exported classifier reads the last token that is not padding: were they the same, it would read the token before the
    end. Raises UserError when the tokenizer has no other special token.
    """
    others = [token for token in (tokenizer.pad_token, *tokenizer.all_special_tokens) if token is not None]
    for token in others:
        if tokenizer.convert_tokens_to_ids(token) != end_id:
            return str(token)
    raise UserError(
        "objective.name: reward_model needs a padding token that is not the one that ends an answer, and the tokenizer has "
        "no other special token: add a pad token to the tokenizer and a row for it to the model's embeddings"
    )


def check_classifier(model: Any) -> None:
    """Raise UserError, before any training, for a model that transformers has no sequence classifier of."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"objective.name: reward_model is exported as a sequence classifier, and transformers has none for "
            f"{model.config.model_type}"
        )


def export_reward_model(
    policy: Policy, score: ScalarHead, config: ModelConfig, tokenizer: Any, end_id: int, target: Path
) -> None:
    """Write a Hugging Face directory that AutoModelForSequenceClassification loads: one label, the reward. Collective.

    `score`: the head. The tokenizer pads with another token than `end_id`. The tensors keep their dtype, and the config says
    float32, so that half-precision weights are loaded as that: the classifier's own head would round every score to 8 bits.
    """
    dtype = torch_dtype(config)
    head = whole_weights(list(score.named_parameters()), keep=is_main_rank())
    model, name = _classifier(config, tokenizer, end_id, rows_of(policy))
    prefixes = policy.causal_model.base_model_prefix, model.base_model_prefix

    def name_of(causal: str) -> str | None:
        inner = f"{prefixes[0]}."
        return f"{prefixes[1]}.{causal.removeprefix(inner)}" if causal.startswith(inner) else None

    more = {name: head["weight"].to(dtype)} if head else {}
    write_in_files(policy, target, lambda: merger(policy, config), lambda: model, name_of, more)

    def write() -> None:
        model.config.dtype = torch.promote_types(dtype, torch.float32)
        model.config.save_pretrained(target)
        previous, tokenizer.pad_token = tokenizer.pad_token, padding_token(tokenizer, end_id)
        tokenizer.save_pretrained(target)
        tokenizer.pad_token = previous

    wait_for_main(write)


def _classifier(config: ModelConfig, tokenizer: Any, end_id: int, rows: int) -> tuple[Any, str]:
    """The classifier without its weights, and the name of its head's."""
    from transformers import AutoModelForSequenceClassification

    settings = load_settings(config)
    settings.num_labels = 1
    settings.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer, end_id))
    model: Any = empty_model(AutoModelForSequenceClassification, settings, config, torch_dtype(config))
    grow(model, rows)
    shape = (1, model.get_input_embeddings().weight.shape[1])
    heads = [
        (name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and one.weight.shape == shape
    ]
    if len(heads) != 1 or heads[0][1].bias is not None:
        raise RuntimeError(f"{type(model).__name__} has no plain scalar head to put the reward's weights into")
    return model, f"{heads[0][0]}.weight"

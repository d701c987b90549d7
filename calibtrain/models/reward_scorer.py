"""A reward model at work: any one-label sequence classifier of transformers, asked for the scores of token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calibtrain.config_rewards import ModelSource
from calibtrain.distributed import World, gather_lists
from calibtrain.errors import UserError
from calibtrain.models.loading import LEARNED_POSITIONS, LOAD_ERRORS, cause, is_gone
from calibtrain.models.quantized import check_full_precision
from calibtrain.models.sharded_loading import load_in_parts, safetensors_places
from calibtrain.models.sharding import full_shape, inference_settings, run_sharded
from calibtrain.ops import at_least_float32

ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta", "modernbert")
"""Model types whose table of positions ends too, beside LEARNED_POSITIONS."""


class RewardScorer:
    """Scores of token sequences by a reward model, in evaluation mode and without gradient; its head multiplies in fp32.

    `zero` is a DeepSpeed section `zero_optimization` of stage 3: the weights are then sharded over the ranks, which run the
    same number of batches. Without it the model lies whole on `world.device`. Raises UserError as `check_reward_model`, and
    where weights are missing. Collective.
    """

    def __init__(
        self, source: ModelSource, key: str, dtype: torch.dtype, world: World, zero: dict[str, Any] | None = None
    ) -> None:
        self.world, self.sharded, self.batch_size = world, zero is not None, source.batch_size
        model, tokenizer = _loaded(source, key, dtype, zero), reward_tokenizer(source, key)
        self.room = min(source.max_length, _positions(model.config) or source.max_length)
        self.own_pad: int | None = tokenizer.pad_token_id
        self.vocabulary = int(full_shape(model.get_input_embeddings().weight)[0])
        _multiply_in_float32(model)
        self.settings = model.config.get_text_config()
        self.engine = None if zero is None else run_sharded(model, dtype, zero)
        self.model: Any = model.to(world.device) if self.engine is None else self.engine.module
        self.model.eval()

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Score of each sequence of ids (at most `room`, none empty), float32 values. Collective where it is sharded."""
        unique = sorted({tuple(one) for one in sequences}, key=lambda one: (len(one), one))
        batches = [unique[start : start + self.batch_size] for start in range(0, len(unique), self.batch_size)]
        rounds = max(gather_lists([len(batches)])) if self.sharded else len(batches)
        scores: dict[tuple[int, ...], float] = {}
        for batch in batches:
            scores.update(zip(batch, self._scores(batch).tolist(), strict=True))
        for _ in range(rounds - len(batches)):  # the others wait for this rank's share of each weight
            self._scores([(0, 1)])
        return [scores[tuple(one)] for one in sequences]

    def _scores(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """(B,) float32, on CPU."""
        width = max(map(len, batch))
        pad = self._pad({one[-1] for one in batch})
        ids = torch.full((len(batch), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        self.settings.pad_token_id = pad  # the classifier reads the last token that is another
        logits = self.model(input_ids=ids.to(self.world.device), attention_mask=mask.to(self.world.device)).logits
        return logits[:, 0].float().cpu()

    def _pad(self, last: Iterable[int]) -> int:
        """A token to pad with that ends no sequence of the batch: of one that it ended, the classifier would read another.

        Behind a mask it does not matter which, but to models that count positions by the padding token: they have one of
        their own, which ends no text.
        """
        taken = set(last)
        own = [self.own_pad] if self.own_pad is not None else []
        return next(one for one in (*own, *range(self.vocabulary)) if one not in taken)


def reward_settings(source: ModelSource, key: str) -> Any:
    """The Hugging Face config of a reward model. Raises UserError, naming the config's `key`, for what is none."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    path = Path(expanduser(source.path))
    if is_gone(source.path):
        raise UserError(f"{key}: no such directory: {source.path}; `calibtrain train reward_model` writes OUT/model")
    if isdir(path) and not (path / "config.json").is_file():
        raise UserError(f"{key}: {source.path} has no config.json; it must be a Hugging Face model directory")
    settings = _from_pretrained(AutoConfig, source, key)
    if type(settings) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{key}: {source.path}: transformers has no sequence classifier of {settings.model_type}; code of a model's own "
            "is not run"
        )
    names = getattr(settings, "architectures", None) or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        told = names[0] if names else settings.model_type
        raise UserError(
            f"{key}: {source.path} is {told}, no sequence classifier; `calibtrain train reward_model` makes a reward model"
        )
    if settings.num_labels != 1:
        raise UserError(f"{key}: {source.path} has {settings.num_labels} labels; a reward model has one, the reward")
    if isdir(path) and not any(any(path.glob(one)) for one in ("*.safetensors", "*.bin")):
        raise UserError(f"{key}: {source.path} holds no weights (*.safetensors)")
    check_full_precision(f"{key}: {source.path}", settings)
    return settings


def reward_parameters(source: ModelSource, key: str) -> int:
    """How many parameters a reward model has, without reading its weights. Raises UserError as `reward_settings` does."""
    from transformers import AutoModelForSequenceClassification

    settings = reward_settings(source, key)
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(settings)
    return sum(one.numel() for one in model.parameters())


def reward_tokenizer(source: ModelSource, key: str) -> Any:
    """The reward model's own tokenizer. Raises UserError where it has none that fits its embeddings."""
    from transformers import AutoTokenizer

    rows = getattr(reward_settings(source, key).get_text_config(), "vocab_size", None)
    tokenizer = _from_pretrained(AutoTokenizer, source, key)
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    if not vocabulary.keys() - special:
        raise UserError(f"{key}: {source.path} has no tokenizer; copy the one it was trained with beside it")
    beyond = [token for token, index in vocabulary.items() if isinstance(rows, int) and index >= rows]
    if any(token not in special for token in beyond):
        raise UserError(
            f"{key}: the tokenizer in {source.path} has {len(beyond)} tokens that the model has no embedding of "
            f"({beyond[0]!r}): copy the one it was trained with beside it"
        )
    return tokenizer


def reward_file(source: ModelSource, name: str) -> Path | None:
    """A file of the reward model's directory or repository, or None where it has none."""
    from transformers.utils import cached_file

    if is_gone(source.path):
        return None
    found = cached_file(
        expanduser(source.path) if isdir(expanduser(source.path)) else source.path,
        name,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _loaded(source: ModelSource, key: str, dtype: torch.dtype, zero: dict[str, Any] | None) -> Any:
    from transformers import AutoModelForSequenceClassification as Classifier

    settings = reward_settings(source, key)
    parts = None if zero is None else _in_parts(source, key, settings, dtype, zero)
    if parts is None:
        model, found = _from_pretrained(Classifier, source, key, dtype=dtype, output_loading_info=True)
        parts = model, found["missing_keys"]
    model, lost = parts
    if missing := sorted(lost):
        raise UserError(
            f"{key}: {source.path} lacks {len(missing)} weights, {missing[0]} among them: it would score by chance"
        )
    model.config.use_cache = False
    return model.requires_grad_(False)


def _in_parts(
    source: ModelSource, key: str, settings: Any, dtype: torch.dtype, zero: dict[str, Any]
) -> tuple[Any, list[str]] | None:
    """`load_in_parts` of a reward model; None where it is not in safetensors."""
    from transformers import AutoModelForSequenceClassification as Classifier

    try:
        places = safetensors_places(lambda name: reward_file(source, name))
        if places is None:
            return None
        return load_in_parts(
            lambda: Classifier.from_config(settings, dtype=dtype),
            places,
            inference_settings(dtype, zero),
            dtype,
            f"{key}: {source.path}",
        )
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: cannot load {source.path}: {cause(error)}") from None


def _multiply_in_float32(model: Any) -> None:
    """Make the map to one number in fp32, as `ScalarHead` does: in bf16 scores are a few hundred different numbers."""
    heads: list[Any] = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == 1]

    def forward(hidden: Tensor, head: Any = heads[-1] if heads else None) -> Tensor:
        bias = None if head.bias is None else at_least_float32(head.bias)
        return linear(at_least_float32(hidden), at_least_float32(head.weight), bias)

    if heads:
        heads[-1].forward = forward  # its hooks, which bring a sharded weight, stay


def _positions(settings: Any) -> int | None:
    text = settings.get_text_config()
    places = getattr(text, "max_position_embeddings", None)
    if text.model_type not in (*LEARNED_POSITIONS, *ENCODERS) or not isinstance(places, int):
        return None
    # RoBERTa's table begins behind its padding token.
    return places - (text.pad_token_id or 0) - 1 if "roberta" in text.model_type else places


def _from_pretrained(kind: Any, source: ModelSource, key: str, **options: Any) -> Any:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    path = Path(expanduser(source.path))
    try:
        return kind.from_pretrained(
            str(path) if isdir(path) else source.path, revision=source.revision, trust_remote_code=False, **options
        )
    except (*LOAD_ERRORS, KeyError) as error:
        what = cause(error)
        if "trust_remote_code" in str(error):
            what = "it needs Python code of its own, which is not run"
        raise UserError(f"{key}: cannot load {source.path}: {what}") from None

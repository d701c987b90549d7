"""From the config's losses to modules."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.queries import choice_ids
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses import build_loss
from calibtrain.losses.silence import reads
from calibtrain.models.confidence_head import ConfidenceHead
from calibtrain.models.loss_model import LossModel
from calibtrain.models.new_token import add_token

TOKENS: Mapping[str, str] = {
    "label_smoothing": "tokens",
    "idk": "token",
    "tokenized_brier": "levels",
    "correctness_query": "choices",
}
"""Losses with a `token_set`, and the key of their section that holds its tokens as text."""

CHECKED_TOGETHER = 64
"""Examples that are looked at as one batch: a loss may count what several have together."""

TokenIds = Callable[[Any, Sequence[str]], Sequence[int]]


def build_losses(config: RunConfig, template: Template, model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The objective, and the penalties whose gradient trains the weights. A token that the model lacks is added to it.

    Raises UserError for texts that are no single token, for a loss of one's own that cannot be built, and for two losses
    with a term of the same name.
    """

    def token_ids(section: Any, texts: Sequence[str]) -> Sequence[int]:
        if section.name == "idk":
            return [add_token(model, template.tokenizer, texts[0])]
        try:
            return choice_ids(template, texts)
        except UserError as error:
            raise UserError(f"{section.name}.{TOKENS[section.name]}: {error}") from error

    objective = _built(config.objective, token_ids)
    penalties = [_built(section, token_ids) for section in config.penalties_in_loss]
    names = Counter(name for loss in (objective, *penalties) for name in _term_names(loss))
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise UserError(f"penalties: two losses have a term called {', '.join(twice)}; give yours other names")
    return objective, penalties


def term_names(config: RunConfig) -> list[str]:
    """Names of all loss terms of a run, without its model: they do not depend on which tokens a set holds."""
    names = {name for loss in _without_tokens(config) for name in _term_names(loss)}
    return sorted(names | ({ConfidenceHead.name} if config.trains_head else set()))


def measure_names(config: RunConfig) -> list[str]:
    """Names of what a run's losses tell beside their terms."""
    return sorted({name for loss in _without_tokens(config) for name in getattr(loss, "measured", ())})


def _without_tokens(config: RunConfig) -> list[nn.Module]:
    def no_ids(section: Any, texts: Sequence[str]) -> Sequence[int]:
        return range(len(texts))

    return [_built(section, no_ids) for section in (config.objective, *config.penalties_in_loss)]


def check_learns(config: RunConfig, model: LossModel, examples: Sequence[tuple[Encoded, ...]]) -> None:
    """Raise UserError where the objective, or a penalty, finds nothing in any of the run's `examples`.

    It would be 0 from the first step to the last. What reads the model's own answers is left out: there are none yet.
    """
    assert model.objective is not None
    answered = {penalty.name for penalty in config.penalties_on_answers}
    losses = [model.objective, *(one for one in model.penalties if one.name not in answered)]
    missing = {loss: set(_term_names(loss)) for loss in losses}
    device = next(model.parameters()).device
    for start in range(0, len(examples), CHECKED_TOGETHER):
        together = [one for group in examples[start : start + CHECKED_TOGETHER] for one in group]
        batch = collate(together, 0, config.nll_scope).to(device)
        for loss, names in missing.items():
            names -= {name for name, count in loss.counts(batch).items() if count}  # type: ignore[operator]
        if not any(missing.values()):
            return
    for loss, names in missing.items():
        if names:
            raise UserError(
                f"{loss.name}: none of the {len(examples)} training examples has anything for {', '.join(sorted(names))}, "
                f"which would be 0 in every step: {reads(names)}"
            )


def import_loss(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a user's own loss from its import path `package.module:Class`, seen from the working directory.

    Raises UserError when it is not there, cannot be built from the arguments, or is no loss.
    """
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # stays: the module may import its neighbours later
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"loss: {path}: cannot import {module_name}: {error}; it is looked for in the working directory "
            f"({Path.cwd()}) and among installed packages"
        ) from error
    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        found = [name for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, nn.Module)]
        raise UserError(f"loss: {path}: {module_name} has no torch.nn.Module {attribute}; it has {found or 'none'}")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UserError(f"loss: {path}: arguments {dict(arguments)}: {error}") from error
    loss = kind(**arguments)
    if not isinstance(getattr(loss, "name", None), str) or not callable(getattr(loss, "counts", None)):
        raise UserError(f"loss: {path}: a loss has a `name` and `counts(batch)`; see docs/losses-in-your-trainer.md")
    return loss


def _built(section: Any, token_ids: TokenIds) -> nn.Module:
    if section.name == "custom":
        return import_loss(section.loss, section.arguments)
    if section.name not in TOKENS:
        return build_loss(section)
    texts = getattr(section, TOKENS[section.name])
    return build_loss(section, token_set=token_ids(section, (texts,) if isinstance(texts, str) else texts))


def _term_names(loss: nn.Module) -> list[str]:
    try:
        return list(loss.counts(collate([], 0)))  # type: ignore[operator]
    except Exception as error:
        raise UserError(
            f"{loss.name}: counts(batch) failed on a batch without sequences ({type(error).__name__}: {error}); a rank may "
            "get one, so it must count 0 there"
        ) from error

"""LoRA, and adapters that can only rotate, around a model: what is asked for is checked against its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import torch_dtype
from calibtrain.models.sharding import full_shape, gathered
from calibtrain.spectral.shared_rotation import add_shared_rotations


def add_lora(model: Any, config: ModelConfig) -> Any:
    """Wrap `model` with PEFT's LoRA; base weights are frozen."""
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    if lora is None:
        return model
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    check_targets(model, lora.target_modules, "model.lora.target_modules")
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
                use_rslora=lora.rank_stabilized,
                use_dora=lora.dora,
            ),
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {error}") from error
    if lora.load_in_4bit:  # PEFT makes adapters in the dtype of the weight beside them, and leaves those of packed ones
        for one in adapted.parameters():
            one.data = one.data.to(torch_dtype(config)) if one.requires_grad else one.data
    return adapted


def add_adapter(model: Any, config: ModelConfig, *, find_bases: bool = True) -> Any:
    """Adapters that can only rotate (and scale) the weights; all the rest is frozen.

    `find_bases=False` leaves the singular bases of a shared rotation for a state dict to bring.
    """
    adapter = config.adapter
    if adapter is None:
        return model
    check_targets(model, adapter.target_modules, "model.adapter.target_modules", linear=True)
    if adapter.kind == "oft":
        _check_blocks(model, adapter.target_modules, adapter.block_size)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    if adapter.kind == "shared_rotation":
        return add_shared_rotations(
            model,
            adapter.rank,
            adapter.target_modules,
            find_bases=find_bases,
            whole=lambda layer: gathered([layer.weight]),
        )
    from peft import OFTConfig, get_peft_model

    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    # PEFT's Cayley-Neumann series is orthogonal only to first orders and, unlike its exact form, gives the inverse rotation.
    settings = OFTConfig(
        oft_block_size=adapter.block_size, target_modules=targets, task_type="CAUSAL_LM", use_cayley_neumann=False
    )
    try:
        return get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"model.adapter: {error}") from error


def check_targets(model: Any, targets: Sequence[str] | str, key: str, *, linear: bool = False) -> None:
    """Raise UserError for a name that reaches no layer, or one that would not be trained and exported as it stands.

    Losses read the weights of the head beside its module, so that an adapter there would never move; and tied embeddings
    are the head's as well. `linear`: adapters of other layers than linear ones are refused, too.
    """
    if isinstance(targets, str):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for target in targets:
        found = named_layers(model, target)
        if not found:
            raise UserError(f"{key}: no layer is called {target!r}; there are {', '.join(_linear_names(model))}")
        if any(layer is head for layer in found):
            raise UserError(f"{key}: {target!r} is the language-model head, which is not adapted; leave it out")
        if any(layer is embedding for layer in found) and (tied or linear):
            why = "is tied to the head, which is not adapted" if tied else "is not a linear layer"
            raise UserError(f"{key}: {target!r} {why}; leave it out")
        if linear and not all(isinstance(layer, torch.nn.Linear) for layer in found):
            raise UserError(f"{key}: {target!r} is not a linear layer; there are {', '.join(_linear_names(model))}")


def named_layers(model: Any, target: str) -> list[Any]:
    """Modules whose name is `target` or ends with it, as PEFT matches names."""
    return [one for name, one in model.named_modules() if name == target or name.endswith(f".{target}")]


def _linear_names(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    linear = [
        name.rpartition(".")[2]
        for name, one in model.named_modules()
        if hasattr(one, "weight") and len(full_shape(one.weight)) == 2 and one is not head
        if one is not model.get_input_embeddings()
    ]
    return list(dict.fromkeys(linear))


def _check_blocks(model: Any, targets: Sequence[str] | str, size: int) -> None:
    """PEFT would take another block size where this one does not fit, layer by layer."""
    names = _linear_names(model) if isinstance(targets, str) else targets
    for name in names:
        for layer in named_layers(model, name):
            width = getattr(layer, "in_features", size)
            if width % size:
                raise UserError(f"model.adapter.block_size: {size} does not divide the {width} inputs of {name}")

"""From the trained engine to a Hugging Face directory that plain `from_pretrained` loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.config import ModelConfig
from calibtrain.distributed import is_main_rank, wait_for_main
from calibtrain.errors import UserError
from calibtrain.models.adapters import add_adapter, add_lora
from calibtrain.models.arithmetic import torch_dtype
from calibtrain.models.loading import load_settings, source_file
from calibtrain.models.policy import Policy, unwrapped
from calibtrain.models.sharding import full_shape, gathered, parameters_on_meta
from calibtrain.models.streamed_export import LayerMerger, whole_weights, write_in_files
from calibtrain.spectral.shared_rotation import merge_shared_rotations


def gathered_weights(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Full weights of a small module on the CPU, from any ZeRO stage, on the ranks that `keep` them. Collective."""
    found: dict[str, Tensor] = {}
    for one in module.named_parameters():
        found |= whole_weights([one], keep=keep)
    return found


def restored_model(weights: dict[str, Tensor], config: ModelConfig) -> Any:
    """Hugging Face causal language model that takes over `weights` (of `gathered_weights`), adapters merged."""
    return _merged(_with_weights(weights, config), config)


def empty_model(kind: Any, settings: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    """A model of an Auto class without memory for its weights, which all are put into it afterwards.

    Initialising 70B weights at random, to write others over them, takes one core half an hour.
    """
    build = partial(kind.from_config, settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = build()
    kept = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    # Buffers that are saved with the weights have values of their own, and adapters merge by some that are not.
    return build() if kept or config.adapter is not None else model


def _with_weights(weights: dict[str, Tensor], config: ModelConfig) -> Any:
    """The trained model, with its adapters where it has any."""
    from transformers import AutoModelForCausalLM

    model = empty_model(AutoModelForCausalLM, load_settings(config), config, torch_dtype(config))
    if config.lora is not None:
        model = add_lora(model, config)
    if config.adapter is not None:  # merged in fp32: bf16 products of nearly the identity would lose the rotation
        model = add_adapter(model.float(), config, find_bases=False)
        weights = {name: one.float() for name, one in weights.items()}
    policy = Policy(model)
    _make_room(policy, weights)
    # A tied head appears once among parameters, under the embedding's name.
    missing, unexpected = policy.load_state_dict(weights, strict=False, assign=True)
    policy.causal_model.tie_weights()
    tied = {name for name, _ in policy.named_parameters(remove_duplicate=False)} - {
        name for name, _ in policy.named_parameters()
    }
    buffers = {name for name, _ in policy.named_buffers()}
    lost = sorted(set(missing) - tied - buffers)
    if lost or unexpected:
        raise RuntimeError(f"export lost weights: missing {lost[:4]}, unexpected {list(unexpected)[:4]}")
    return model


def _merged(model: Any, config: ModelConfig) -> Any:
    if config.lora is not None:
        model = model.merge_and_unload()
    if config.adapter is not None:
        turned = config.adapter.kind == "shared_rotation"
        model = (merge_shared_rotations(model) if turned else model.merge_and_unload()).to(torch_dtype(config))
    return model


def _make_room(policy: Policy, weights: dict[str, Tensor]) -> None:
    """As many embeddings as the trained model has: it may have got tokens that its source did not have."""
    own = policy.causal_model.get_input_embeddings().weight
    name = next(name for name, parameter in policy.named_parameters() if parameter is own)
    if name in weights and weights[name].shape[0] != own.shape[0]:
        policy.causal_model.resize_token_embeddings(weights[name].shape[0], mean_resizing=False)


def export_model(
    policy: Policy, config: ModelConfig, tokenizer: Any, target: Path, scale: float = 1.0, end_id: int | None = None
) -> None:
    """Write the policy's weights as a Hugging Face directory: adapters merged, the logit `scale` folded in. Collective.

    No rank holds the model: layers are gathered one at a time, and rank 0 writes files of about a gigabyte. Its
    generation_config.json is the source's; `end_id`, which ended the answers in training, joins the tokens that end a
    generation, so that whatever serves the model stops where it learnt to.
    """
    from transformers import AutoModelForCausalLM

    def describe() -> Any:
        model = empty_model(AutoModelForCausalLM, load_settings(config), config, torch_dtype(config))
        grow(model, rows_of(policy))
        model.config.use_cache = True
        return model

    write_in_files(policy, target, lambda: merger(policy, config, scale), describe)

    def write_beside() -> None:
        tokenizer.save_pretrained(target)
        _write_generation_config(config, target, tokenizer.eos_token_id if end_id is None else end_id)

    wait_for_main(write_beside)


def merger(policy: Policy, config: ModelConfig, scale: float = 1.0) -> LayerMerger:
    """What merges the layers of `policy` and folds the logit `scale` into them; it takes no memory for weights."""
    model = _meta_model(config, rows_of(policy))
    if scale == 1.0:
        return LayerMerger(model, config, torch_dtype(config))
    causal = unwrapped(model)
    head = causal.get_output_embeddings()
    untied = head.weight is not causal.get_input_embeddings().weight
    carrier = head.weight if untied else _final_norm(causal).weight
    carries = next(name for name, one in Policy(model).named_parameters() if one is carrier)
    return LayerMerger(model, config, torch_dtype(config), carries, lambda model: fold_scale(model, scale))


def rows_of(policy: Policy) -> int:
    """Embeddings of the trained model: it may have got tokens that its source did not have."""
    return int(full_shape(policy.causal_model.get_input_embeddings().weight)[0])


def grow(model: Any, rows: int) -> None:
    """As many embeddings as the trained model has."""
    if model.get_input_embeddings().weight.shape[0] != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _meta_model(config: ModelConfig, rows: int) -> Any:
    """The model with its adapters, its parameters on the meta device and its buffers real."""
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            load_settings(config), dtype=torch_dtype(config), trust_remote_code=config.trust_remote_code
        )
        grow(model, rows)
        model = add_lora(model, config) if config.lora is not None else model
        return add_adapter(model, config, find_bases=False) if config.adapter is not None else model


def export_adapter(policy: Policy, config: ModelConfig, target: Path) -> None:
    """Write the LoRA adapter alone, as `peft.PeftModel.from_pretrained` loads it beside the model that it was trained on.

    It holds no logit scale: with it the model answers alike, and its confidence is that of training, not the calibrated one.
    Collective.
    """
    causal = policy.causal_model
    # PEFT writes embeddings too, where a token has been added or they are adapted themselves.
    beside = {id(layer.weight) for layer in (causal.get_input_embeddings(), causal.get_output_embeddings())}
    named = [(name, one) for name, one in policy.named_parameters() if ".lora_" in name or id(one) in beside]
    weights = whole_weights(named, keep=is_main_rank())

    def write() -> None:
        model = _meta_model(config, rows_of(policy))
        Policy(model).load_state_dict(weights, strict=False, assign=True)
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = config.source
            settings.revision = config.revision
        model.save_pretrained(target)

    wait_for_main(write)


def _write_generation_config(config: ModelConfig, target: Path, end_id: int) -> None:
    # As JSON: transformers refuses to save what it had no trouble to load (a temperature without do_sample).
    file = target / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    source = source_file(config, "generation_config.json")
    if source is not None:
        settings = json.loads(source.read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    ends = ends if end_id in ends else [*ends, end_id]
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def fold_scale(model: Any, scale: float) -> None:
    """Multiply the logits' inverse temperature into the weights: into an untied head, else into the final norm.

    Raises UserError for a tied model whose final norm cannot carry it; `check_scale_folds` finds that before training.
    """
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        head.weight.mul_(scale)
        return
    norm = _final_norm(model)
    # Gemma's norms multiply by 1 + weight.
    if _norm_offset(norm):
        norm.weight.copy_((1.0 + norm.weight.float()) * scale - 1.0)
    else:
        norm.weight.mul_(scale)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)


def check_scale_folds(model: Any) -> None:
    """Raise UserError, before any training, when a calibrated logit scale could not be folded into this model."""
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return
    norm = _final_norm(model)
    with torch.no_grad(), gathered(norm.parameters()):
        weight = norm.weight.detach().clone()
        probe = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
        before = norm(probe).float()
        fold_scale(model, 2.0)
        after = norm(probe).float()
        norm.weight.copy_(weight)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(2.0)
    if not torch.allclose(after, 2.0 * before, rtol=2e-2, atol=1e-3):
        raise UserError(_cannot_fold(model))


def _final_norm(model: Any) -> Any:
    """The decoder's last child with a weight per hidden unit."""
    decoder = model.base_model
    hidden = full_shape(model.get_input_embeddings().weight)[1]
    for _, module in reversed(list(decoder.named_children())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and full_shape(weight) == (hidden,):
            return module
    raise UserError(_cannot_fold(model))


def _norm_offset(norm: Any) -> bool:
    probe = torch.linspace(-1, 1, norm.weight.shape[0], dtype=norm.weight.dtype, device=norm.weight.device)[None]
    with torch.no_grad():
        weight = norm.weight.clone()
        norm.weight.zero_()
        offset = bool(norm(probe).abs().max() > 0) and getattr(norm, "bias", None) is None
        norm.weight.copy_(weight)
    return offset


def _cannot_fold(model: Any) -> str:
    return (
        f"penalties.answer_score.moves: scale needs a final norm to carry the scale, and {type(model).__name__} (with tied "
        "embeddings) has none that is known; set moves: all"
    )

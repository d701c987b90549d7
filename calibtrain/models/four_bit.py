"""A frozen base in four bits, as QLoRA trains adapters on (Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes.

NF4 with double quantisation: 64 weights share a scale of eight bits, 256 of these scales one of 32. A layer computes in the
run's dtype, with weights that are unpacked for it. Embeddings, head, norms and biases stay as they are.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError

SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of scales, for each packed weight, which itself takes half a byte."""

CPU_LAYOUT = "support_avx512bf16_for_cpu"
"""What bitsandbytes' layers are asked by themselves before they pack their weights otherwise."""


def is_four_bit(config: ModelConfig) -> bool:
    """Whether the base is loaded in four bits."""
    return config.lora is not None and config.lora.load_in_4bit


def require_bitsandbytes() -> None:
    """Raise UserError where a package that packs weights is not installed. None is imported."""
    for package in ("bitsandbytes", "accelerate"):  # transformers loads four bits with both
        if importlib.util.find_spec(package) is None:
            raise UserError(f'model.lora.load_in_4bit needs {package}: run `pip install "calibtrain[qlora]"`')


def loading_options(dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given to load in four bits, each weight packed as it is read.

    It goes to this process's GPU, where there is one.
    """
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four_bits}


def keep_packed(model: nn.Module) -> None:
    """Hold the weights of a model in four bits as they are: in one layout, and out of what is saved. Nothing for others.

    On CPUs that multiply bf16 bitsandbytes packs them otherwise in evaluation mode, and not back for training: no gradient
    would pass a layer after the first answers. And a checkpoint is to hold none of a frozen weight, its scales neither.
    """
    for module in model.modules():
        if is_packed(getattr(module, "weight", None)):
            setattr(module, CPU_LAYOUT, False)
            module.register_state_dict_post_hook(_leave_out_scales)


def _leave_out_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def packed_layers(model: Any) -> list[nn.Linear]:
    """The layers of a plain model whose weights are packed: all linear ones but the head.

    Raises UserError for a model that has none, or linear layers of a form whose weights could not be written back.
    """
    head = model.get_output_embeddings()
    kinds = {type(module).__name__ for module in model.modules()}
    found = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    if "Conv1D" in kinds or not found:
        why = "has linear layers of another form (Conv1D)" if "Conv1D" in kinds else "has no linear layers"
        raise UserError(f"model.lora.load_in_4bit: {type(model).__name__} {why}; leave it out")
    return found


def is_packed(parameter: Any) -> bool:
    """Whether a weight is held in four bits."""
    return getattr(parameter, "quant_state", None) is not None


def dense(parameter: Any) -> Tensor:
    """A weight as its layer multiplies by it: of one in four bits, unpacked to the dtype that it was loaded in."""
    if not is_packed(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.detach(), parameter.quant_state)

"""A model of which one block at a time lies in memory: embeddings, norms and head stay, blocks come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models.loading import answering_config, cause, load_settings
from calibtrain.quantization.blocks import find_blocks
from calibtrain.quantization.rotation import Rotation, rotate_block, rotate_outside
from calibtrain.spectral.model_files import ModelFiles, open_model


class StreamedModel:
    """A Hugging Face directory whose blocks are read when they are needed.

    Where the directory's tensors are not named as the model's parameters (fused experts), the whole model is read at once
    and stays in memory.
    """

    def __init__(self, source: Path, *, trust_remote_code: bool = False, device: torch.device | str = "cpu") -> None:
        """Read everything but the blocks. Raises UserError for a directory that is none, is quantised or broken."""
        self.source = source
        self.device = torch.device(device)
        self.files: ModelFiles = open_model(source)
        self.settings = load_settings(answering_config(ModelConfig(trust_remote_code=trust_remote_code), source))
        self.dtype = self._stored_dtype()
        self.model = self._skeleton(trust_remote_code)
        self.prefix, self.blocks = find_blocks(self.model)
        blocks = {name for name, _ in self.model.named_parameters() if name.startswith(f"{self.prefix}.")}
        self.streams = blocks <= set(self.files.tensors)
        if self.streams:
            self._fill(self.model, "", skip=f"{self.prefix}.")
            self.model.tie_weights()
        else:
            self.model = self._whole(trust_remote_code)
            self.prefix, self.blocks = find_blocks(self.model)
        self.model.eval().requires_grad_(False)
        self.rotation: Rotation | None = None

    @property
    def pad_id(self) -> int:
        """A token to pad with on the right, where nothing reads it."""
        return 0

    def name_of(self, index: int) -> str:
        """Name of a block: "model.layers.3"."""
        return f"{self.prefix}.{index}"

    def bring(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        block = self.blocks[index]
        if self.streams:
            self._fill(block, f"{self.name_of(index)}.")
            if self.rotation is not None:
                rotate_block(self.model, block, self.rotation)
        return block

    def rotate(self, rotation: Rotation) -> None:
        """Turn the residual stream of what lies in memory now, and of every block that comes."""
        self.rotation = rotation
        rotate_outside(self.model, rotation)
        for block in self.blocks if not self.streams else ():
            rotate_block(self.model, block, rotation)

    def drop(self, index: int) -> None:
        """Let go of a block's weights."""
        if self.streams:
            self.blocks[index].to("meta")

    def others(self) -> dict[str, Tensor]:
        """Parameters and saved buffers outside the blocks, under the names of the file; a tied head under one alone."""
        kept = {
            name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(f"{self.prefix}.")
        }
        seen: dict[int, str] = {}
        return {name: tensor for name, tensor in kept.items() if seen.setdefault(tensor.data_ptr(), name) == name}

    def _stored_dtype(self) -> torch.dtype:
        named = getattr(self.settings, "dtype", None)
        if isinstance(named, torch.dtype):
            return named
        raise UserError(
            f'{self.source / "config.json"}: names no dtype ("torch_dtype"); load the model and save it with save_pretrained'
        )

    def _skeleton(self, trust_remote_code: bool) -> Any:
        """The model without weights; buffers that no file holds (rotary frequencies) are real."""
        from transformers import AutoModelForCausalLM

        try:
            from accelerate import init_empty_weights
        except ImportError:
            raise UserError('quantising needs accelerate: pip install "calibtrain[quantization]"') from None
        try:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    self.settings, trust_remote_code=trust_remote_code, dtype=self.dtype
                )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.source}: {cause(error)}") from None
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        return model

    def _whole(self, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            str(self.source), trust_remote_code=trust_remote_code, dtype=self.dtype
        )
        return model.to(self.device)

    def _fill(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        """Read a module's parameters and saved buffers from the files."""
        found = {}
        for name in module.state_dict():
            stored = self.files.tensors.get(f"{prefix}{name}")
            if stored is not None and not (skip and f"{prefix}{name}".startswith(skip)):
                tensor = stored.read()
                found[name] = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        module.load_state_dict(found, strict=False, assign=True)

"""LoRA adapters of PEFT as they lie in a directory: what they add to each weight, in closed form."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral.layouts import Part
from calibtrain.spectral.model_files import Stored, check_plain, read_header, read_json

MERGE = "merge it first (merge_and_unload, then save_pretrained)"
NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings with which the change is more than scaling * B A of a module's weight."""
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts with which the model under the adapter is not the base model any more."""
ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class LowRank:
    """W - W0 = scaling * B A of one weight, (out, in) whatever the layout of the weight itself."""

    first: Stored  # A (r, in); of an embedding (r, rows)
    second: Stored  # B (out, r); of an embedding (columns, r)
    scaling: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole weight."""
        out, inner = self.second.shape[0], self.first.shape[-1]
        return (inner, out) if self.embedding else (out, inner)

    def factors(self, part: Part) -> tuple[Tensor, Tensor]:
        """(scaling * B (out, r), A (r, in)) in float32, of one matrix of the weight. Raises as `Stored.read` does."""
        first, second = self.first.read().float(), self.second.read().float()
        left, right = (first.mT, second.mT) if self.embedding else (second, first)
        left = (left * self.scaling).contiguous()
        return part.rows(left).reshape(-1, left.shape[1]), right.contiguous()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: low-rank changes and whole tensors, by the names of the weights in the base model."""

    low_rank: dict[str, LowRank]
    whole: dict[str, Stored]


def open_adapter(path: Path) -> Adapter:
    """What an adapter directory changes; only headers are read. Raises UserError where that is no plain LoRA."""
    settings = read_json(path / "adapter_config.json")
    _check_settings(path, settings)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        if (path / "adapter_model.bin").is_file():
            raise UserError(
                f"{path}: adapter_model.bin is no safetensors; load it with PeftModel.from_pretrained and save it with "
                "save_pretrained, which writes safetensors"
            )
        raise UserError(f"{path}: adapter_config.json without adapter_model.safetensors; copy that file too")
    tensors = read_header(file)
    check_plain(path, tensors)
    halves: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is not None:
            halves.setdefault(name.removesuffix(ending), {})[ending] = stored
        elif "lora_" in name and len(stored.shape) > 1:
            raise UserError(f"{path}: {key} is no part of a plain LoRA; {MERGE}")
        elif len(stored.shape) > 1:
            whole[name] = stored
    low_rank = {f"{module}.weight": _pair_up(file, module, found, settings) for module, found in halves.items()}
    # PEFT saves an embedding beside its low-rank change: what it was, not what it became.
    whole = {name: stored for name, stored in whole.items() if name not in low_rank}
    if not low_rank and not whole:
        raise UserError(f"{file}: holds no matrix; is it the right adapter?")
    return Adapter(low_rank, whole)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: a {settings.get('peft_type')} adapter, and only LoRA is read in closed form; {MERGE}")
    used = next((name for name in NOT_PLAIN if settings.get(name)), None)
    if used is not None:
        raise UserError(f"{path}: an adapter with {used}, which is no plain LoRA; {MERGE}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASE):
        raise UserError(f"{path}: init_lora_weights {start} changed the base model as well; {MERGE}")


def _pair_up(file: Path, module: str, found: dict[str, Stored], settings: dict[str, Any]) -> LowRank:
    embedding = any("embedding" in ending for ending in found)
    kind = "embedding_" if embedding else ""
    tail = "" if embedding else ".weight"
    first, second = found.get(f".lora_{kind}A{tail}"), found.get(f".lora_{kind}B{tail}")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        raise UserError(f"{file}: {module} has no pair of matrices lora_A and lora_B; {MERGE}")
    rank = first.shape[0]
    if second.shape[1] != rank:
        raise UserError(
            f"{file}: lora_A and lora_B of {module} differ in rank ({rank}, {second.shape[1]}); save it again"
        )
    alpha = _by_pattern(file.parent, settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8))
    return LowRank(first, second, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), embedding)


def _by_pattern(path: Path, patterns: dict[str, Any], module: str, otherwise: Any) -> float:
    """As PEFT picks it: the first key that is the end of the module's name, as a regular expression."""
    try:
        value = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), otherwise)
        return float(value)
    except (re.error, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: lora_alpha or alpha_pattern of adapter_config.json cannot be read ({error})"
        ) from None

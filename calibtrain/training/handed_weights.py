"""The policy as a directory that a running vLLM loads its weights from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibtrain.config import ModelConfig
from calibtrain.data.templates import Template
from calibtrain.distributed import wait_for_main
from calibtrain.models.export import export_model
from calibtrain.models.policy import Policy

INDEX = "model.safetensors.index.json"
TIED = "tied.safetensors"


def write_weights(policy: Policy, config: ModelConfig, template: Template, target: Path) -> None:
    """Write the policy's weights: adapters merged, a tied head said twice. Collective."""
    export_model(policy, config, template.tokenizer, target, end_id=template.end_id)
    wait_for_main(lambda: _write_tied(policy.causal_model, target))


def _write_tied(causal_model: Any, target: Path) -> None:
    """Write each tied weight under its other name too.

    vLLM 0.32 on a CPU packs a head at its start, and packs it anew where a reload brings the head's own weight alone: of a
    tied one it would go on with what it started from. It skips the second name where it needs it not.
    """
    head = causal_model.get_output_embeddings().weight
    names = [name for name, one in causal_model.named_parameters(remove_duplicate=False) if one is head]
    found: dict[str, Tensor] = {}
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in set(names) & set(opened.keys())}
    missing = [name for name in names if name not in found]
    if not missing or not found:
        return
    value = next(iter(found.values()))
    save_file({name: value.clone() for name in missing}, target / TIED, metadata={"format": "pt"})
    if (target / INDEX).is_file():
        index = json.loads((target / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(missing, TIED)
        (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

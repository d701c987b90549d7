"""Run by the interpreter of an environment that has llm-compressor: the AWQ scales that it finds for a model.

python llmcompressor_scales.py MODEL_DIR TOKENS.json OUT.safetensors GROUP_SIZE
"""

import json
import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, out: str, group_size: str) -> None:
    found: dict[str, torch.Tensor] = {}
    search = AWQModifier._compute_best_scale

    def recorded(self, mapping, *rest):
        found[mapping.smooth_name] = search(self, mapping, *rest)
        return found[mapping.smooth_name]

    AWQModifier._compute_best_scale = recorded
    IntermediatesCache.pin_memory = lambda *args, **named: None  # it needs an accelerator
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with open(tokens) as file:
        rows = [
            {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in json.load(file)
        ]
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": int(group_size)}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    recipe = [AWQModifier(duo_scaling=False, n_grid=20), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    oneshot(model=model, dataset=torch.utils.data.DataLoader(rows, batch_size=None), recipe=recipe)
    save_file({name: scale.contiguous().float() for name, scale in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""llm-compressor's side of benchmarks/quantization.py, run by the interpreter of an environment that has it.

python _quantization_peer.py MODEL_DIR TEXTS.json OUT_DIR SCHEME METHOD GROUP_SIZE
"""

import json
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def groups_of(scheme: str, group_size: int) -> dict:
    """The config groups of a scheme, as our own has them."""
    bits = int(scheme[1])
    weights = {"num_bits": bits, "symmetric": True, "strategy": "channel"}
    if scheme.endswith("a16"):
        weights |= {"strategy": "group", "group_size": group_size}
        return {"all": {"targets": ["Linear"], "weights": weights}}
    inputs = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    return {"all": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}


def recipe_of(method: str, groups: dict) -> list:
    """The modifiers of a method."""
    plain = {"config_groups": groups, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**plain)]
    before = {
        "minmax": [],
        "awq": [AWQModifier()],
        "smoothquant": [SmoothQuantModifier(smoothing_strength=0.8)],
    }[method]
    return [*before, QuantizationModifier(**plain)]


def main(folder: str, texts: str, out: str, scheme: str, method: str, group_size: str) -> None:
    # It needs an accelerator.
    IntermediatesCache.pin_memory = lambda *args, **named: None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for ids in json.loads(Path(texts).read_text())
    ]
    started = time.monotonic()
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    oneshot(model=model, dataset=loader, recipe=recipe_of(method, groups_of(scheme, int(group_size))))
    seconds = time.monotonic() - started
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        (Path(out) / generation.name).write_text(generation.read_text())
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by test_sharding on several ranks: models whose weights lie in parts from the start, against from_pretrained's.

Usage: sharding_cases.py FOLDER. Reads FOLDER/models/*; rank 0 writes FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from calibtrain.config import ModelConfig
from calibtrain.distributed import World, barrier, gather_lists, leave_world, start_world
from calibtrain.errors import UserError
from calibtrain.models.export import gathered_weights
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.new_token import add_token
from calibtrain.models.sharding import inference_settings, is_sharded, run_sharded
from tests.distributed.jobs import SHARDED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IDS = torch.arange(20, 40)[None]


def loaded(path: Path, dtype: str, world: World) -> dict[str, Any]:
    """How far the model in parts is from the one that from_pretrained makes, and how much of it this rank holds."""
    config = ModelConfig(source=str(path), dtype=dtype, attention="eager")
    torch.manual_seed(3)
    whole = load_model(config)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    model = load_model(config, inference_settings(DTYPES[dtype], SHARDED))
    parameters = list(model.parameters())
    held = sum(one.ds_tensor.numel() for one in parameters) / sum(one.numel() for one in whole.parameters())
    found = gathered_weights(model, keep=True)
    expected = dict(whole.named_parameters())
    buffers = dict(whole.named_buffers())
    differing = [name for name in expected if not found[name].equal(expected[name])]
    differing += [name for name, one in model.named_buffers() if not one.equal(buffers[name])]
    engine = run_sharded(model, DTYPES[dtype], SHARDED).module.eval()
    with torch.no_grad():
        gap = (engine(input_ids=IDS).logits - whole(input_ids=IDS).logits).abs().max()
    return {
        "names": found.keys() == expected.keys() and {name for name, _ in model.named_buffers()} == buffers.keys(),
        "all in parts": all(map(is_sharded, parameters)),
        "differing": differing,
        "held": held,
        "gap": float(gap),
        "same draws after it": bool(torch.rand(1) == drawn),
        "eval": not model.training,
    }


def with_token(path: Path) -> dict[str, torch.Tensor]:
    """Embeddings in and out of a model that has got a token."""
    config = ModelConfig(source=str(path), dtype="fp32")
    found = {}
    for kind, zero in (("whole", None), ("parts", inference_settings(torch.float32, SHARDED))):
        model = load_model(config, zero)
        add_token(model, load_tokenizer(config), "[IDK]", like=("not", "sure"))
        for name, one in gathered_weights(model, keep=True).items():
            if "embed" in name or "head" in name:
                found[f"{kind} {name}"] = one
        assert zero is None or all(map(is_sharded, model.parameters()))
    return found


def refused(path: Path) -> str:
    """What is told of a model whose config.json makes it another shape than its files have."""
    try:
        load_model(ModelConfig(source=str(path), dtype="fp32"), inference_settings(torch.float32, SHARDED))
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = start_world()
    results: dict[str, Any] = {"loaded": {}, "token": {}}
    for path in sorted((folder / "models").iterdir()):
        for dtype in DTYPES:
            results["loaded"][path.name, dtype] = gather_lists([loaded(path, dtype, world)])
    for name in ("tied", "untied"):
        results["token"][name] = with_token(folder / "models" / name)
    results["refused"] = refused(folder / "other_shape")
    if world.is_main:
        torch.save(results, folder / "results.pt")
    barrier()
    leave_world()

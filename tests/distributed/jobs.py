"""Small whole runs: a tiny model, graded questions in a file and the YAML that trains on them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.distributed.ranks import forked, torchrun
from tests.tiny import write_tiny_model

TRAIN = ("-m", "calibtrain.launchers.train")
SHARDED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 1_700,
    "stage3_max_live_parameters": 5_000,
    "stage3_max_reuse_distance": 5_000,
}
"""ZeRO-3 of a tiny model (40,000 parameters) as DeepSpeed's defaults are to one of 8B. By those every weight of it would
stay whole; here a prefetch brings less than a layer's widest matrix, and what was used is released."""


def sharded(folder: Path) -> str:
    """A DeepSpeed JSON with SHARDED, for `training.deepspeed`."""
    path = folder / "sharded.json"
    partial = folder / f"sharded.{os.getpid()}"  # ranks write it side by side: none may read another's half
    partial.write_text(json.dumps({"zero_optimization": SHARDED}))
    os.replace(partial, path)
    return str(path)


def write_job(folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Write two models (`tiny`, and `untied` with a head of its own), 200 questions and `folder`/NAME.yaml; returns this.

    Its output goes to `folder`/NAME. At ZeRO-3 weights are sharded as those of a large model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tiny").exists():
        write_tiny_model(folder / "tiny")
        write_tiny_model(folder / "untied", tied=False)
        rows = [{"question": f"What is {i}?", "answers": [f"{i * 7 % 10}"], "kind": "sum"} for i in range(200)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / name),
        "model": {"source": str(folder / "tiny"), "dtype": "fp32"},
        "data": {
            "source": {"kind": "file", "path": str(folder / "questions.jsonl")},
            "max_length": 48,
            "few_shot_raw": 1,
            "splits": {"train": 40, "calibration": 8, "temperature": 8, "certification": 8, "test": 8},
        },
        "objective": {"name": "sft"},
        "penalties": [{"name": "answer_score", "refresh_every": 2, "questions_per_refresh": 5}],
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "log_every": 1,
            "checkpoint_every": 2,
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
        "tracking": {"wandb": False},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    if config["training"].get("zero_stage") == 3:
        config["training"].setdefault("deepspeed", sharded(folder))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(ranks: int, config: Path, *overrides: str) -> list[str]:
    """Command line that trains `config` as its users do."""
    return torchrun(ranks, *TRAIN, str(config), *overrides)


def trained(ranks: int, *configs: Path) -> list[str]:
    """Command line that trains several configs, one after the other, in one launch; an argument a.b=c is an override."""
    return forked(ranks, __file__, *map(str, configs))


def metrics(output: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "second" not in key} for line in lines if line["event"] != "end"
    ]


if __name__ == "__main__":
    from calibtrain.config_file import load_config
    from calibtrain.distributed import leave_world
    from calibtrain.pipeline.train import run

    overrides = [one for one in sys.argv[1:] if not one.endswith(".yaml")]
    for path in sys.argv[1:]:
        if path.endswith(".yaml"):
            run(load_config(path, overrides))
    leave_world()

"""What made a run: its config, versions of packages, the commit and the data."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from typing import TYPE_CHECKING

from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config
from calibtrain.data.drops import write_dropped
from calibtrain.distributed import World
from calibtrain.models.arithmetic import instruction_set
from calibtrain.models.start_mark import start_mark
from calibtrain.training.deepspeed_config import deepspeed_dict

if TYPE_CHECKING:
    from calibtrain.pipeline.check import Checked
    from calibtrain.training.trainer import Trainer

PACKAGES = ("calibtrain", "torch", "deepspeed", "transformers", "datasets", "peft", "wandb")


def versions() -> dict[str, str]:
    """Versions of the packages that shape a run."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_hash() -> str | None:
    """Commit of the working directory, with "+changes" when it differs from it; None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_provenance(config: RunConfig, checked: Checked, trainer: Trainer, world: World) -> None:
    """config.yaml, deepspeed.json and run.json: what made this run."""
    output, prepared = config.output_dir, checked.prepared
    output.mkdir(parents=True, exist_ok=True)
    dump_config(config, output / "config.yaml")
    hidden_size = getattr(trainer.engine.module.policy.causal_model.config, "hidden_size", None)
    settings = deepspeed_dict(config, world.size, hidden_size=hidden_size)
    (output / "deepspeed.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    run_facts = {
        "versions": versions(),
        "git": git_hash(),
        "world_size": world.size,
        "compute": {"instruction_set": instruction_set(), "dtype": config.model.dtype},
        "total_steps": trainer.total_steps,
        "data_hash": trainer.data_hash,
        "records_hash": checked.records_hash,
        "template_hash": checked.template.hash,
        "start": start_mark(config.model),
        "records_read": prepared.read,
        "splits": {name: len(records) for name, records in prepared.splits.items()},
        "available": prepared.available,
        "dropped": prepared.drops.lines(),
    }
    (output / "run.json").write_text(json.dumps(run_facts, indent=2), encoding="utf-8")
    write_dropped(prepared.drops.unfit, output / "dropped.jsonl")

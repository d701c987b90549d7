"""Whose an output_dir is: one run's. It may be gone on with; another run does not write over it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from calibtrain.config import RunConfig
from calibtrain.errors import UserError, short
from calibtrain.training.checkpoint import complete_checkpoints
from calibtrain.training.trajectory import changed_keys, refused

WAYS_OUT = "give another output_dir, or move or remove this one"


def is_finished(output_dir: Path) -> bool:
    """Whether a run has come to its end here. A model directory that has its name is whole."""
    return (output_dir / "model" / "config.json").is_file()


def check_output_dir(config: RunConfig) -> bool:
    """Return whether this very run has ended in its output_dir; then there is nothing to train.

    Raises UserError where another run lies there, or this one and `training.resume` does not say to go on with it: its
    checkpoints would be taken for those of the new run, and deleted as the older ones. A run that ended before its first
    checkpoint has left nothing to lose and is no obstacle.
    """
    output, resume = config.output_dir, config.training.resume
    _check_can_be_written(output)
    checkpoints = complete_checkpoints(output / "checkpoints")
    finished = is_finished(output)
    if not finished and not checkpoints:
        return False
    if resume == "auto":
        return finished and _is_this_run(config)  # of checkpoints, find_checkpoint says whose they are
    if resume is not None and _inside(resume, output):
        return False
    if finished:
        raise UserError(f"output_dir: {output} holds a finished run; {WAYS_OUT}")
    last = int(checkpoints[-1].name.removeprefix("step-"))
    raise UserError(
        f"output_dir: {output} holds a run that was interrupted after step {last}; go on with it by training.resume=auto, "
        f"or {WAYS_OUT}"
    )


def _check_can_be_written(output: Path) -> None:
    """Raise UserError now for what would end a run at its first file."""
    try:
        nearest = next(one for one in (output.absolute(), *output.absolute().parents) if one.exists())
    except OSError as error:
        raise UserError(f"output_dir: {short(str(output))} cannot be made: {error.strerror}") from None
    if not nearest.is_dir():
        raise UserError(f"output_dir: {output} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {output} cannot be written: no permission to write into {nearest}")


def check_replaceable(config: RunConfig) -> bool:
    """Return whether output_dir holds a run, one of the same name, which may then be replaced; of another one UserError."""
    output = config.output_dir
    _check_can_be_written(output)
    if not is_finished(output) and not complete_checkpoints(output / "checkpoints"):
        return False
    name = _config_of(output).get("name", "of unknown name")
    if name != config.name:
        raise UserError(f"output_dir: {output} holds another run ({name}); {WAYS_OUT}")
    return True


def check_same_data(output_dir: Path, records_hash: str) -> None:
    """Raise UserError where the run that has ended here read other records."""
    try:
        facts = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    if facts.get("records_hash", records_hash) != records_hash:
        raise UserError(f"training.resume: {output_dir} holds a finished run on other data; {WAYS_OUT}")


def _is_this_run(config: RunConfig) -> bool:
    """True, or UserError with what differs. False where it goes on, on a new trajectory."""
    made_by = _config_of(config.output_dir)
    if not made_by:
        raise UserError(
            f"training.resume: {config.output_dir} holds a finished run, and its config.yaml cannot be read; {WAYS_OUT}"
        )
    differing = refused(made_by, config)
    if differing:
        told = "; ".join([*differing[:4], *([f"and {len(differing) - 4} more"] if len(differing) > 4 else [])])
        raise UserError(
            f"training.resume: {config.output_dir} holds a finished run of another config ({told}); {WAYS_OUT}"
        )
    return not changed_keys(made_by, config)


def _config_of(output_dir: Path) -> dict[str, Any]:
    """The resolved config of the run that lies here, as plain values; nothing where it cannot be read."""
    try:
        values = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _inside(path: Path, output_dir: Path) -> bool:
    return path.resolve().is_relative_to(output_dir.resolve())

"""What commands check of their arguments before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from calibtrain.errors import UserError


def existing(output_dir: Path) -> Path:
    """The output_dir of a run. Raises UserError for anything else."""
    if not output_dir.is_dir():
        raise UserError(f"{output_dir}: no such directory; give the output_dir of a finished run")
    if not (output_dir / "config.yaml").is_file():
        raise UserError(f"{output_dir}: not the output_dir of a run (it has no config.yaml)")
    return output_dir


def trained(output_dir: Path) -> Path:
    """The output_dir of a run that has exported its model. Raises UserError for anything else."""
    model = existing(output_dir) / "model"
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise UserError(
            f"{output_dir}: training has not finished (no exported model in {model}); go on with "
            f"`calibtrain train {output_dir / 'config.yaml'} training.resume=auto`"
        )
    return output_dir


def check_model(model: Path) -> None:
    """Raise UserError for what is no Hugging Face directory with weights."""
    if not (model / "config.json").is_file():
        raise UserError(f"--model: {model} is not a Hugging Face model directory (no config.json)")
    if not any(any(model.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UserError(f"--model: {model} holds no weights (*.safetensors)")


def asks(engine: str | None, engine_model: str | None) -> bool:
    """Whether a server is asked."""
    if engine is None and engine_model is not None:
        raise UserError("--engine-model: goes with --engine, the address of the server")
    return engine is not None


def shares(options: dict[str, float | None]) -> None:
    """Raise UserError for an option, by its name, that is not between 0 and 1."""
    for name, value in options.items():
        if value is not None and not 0 < value < 1:
            raise UserError(f"{name}: {value} is not between 0 and 1")


def on_processes(number: int | None, *, alone: str | None = None) -> None:
    """Run this very command on `number` processes instead, and end with its exit code; nothing for one.

    `alone`: an option that is given and does not go with several. Raises UserError then.
    """
    from calibtrain.launchers.team import MEMBER, launch

    member = MEMBER in os.environ
    if number in (None, 1) and not member:
        return
    if alone is not None:
        started = "several processes" if number in (None, 1) else "--num-processes"
        raise UserError(f"{started}: {alone} asks in one process; leave one of them out")
    if not member:
        import typer

        raise typer.Exit(launch(sys.argv[1:], number or 1))

"""What commands check of their arguments before anything heavy is imported."""

from __future__ import annotations

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

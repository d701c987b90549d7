"""The files of a checkpoint and their sizes, by which one that was cut short, or lost a file, is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from calibtrain.errors import UserError

logger = logging.getLogger(__name__)

FILES = "files.json"


def note_files(path: Path) -> None:
    """Write down what a checkpoint consists of; the last thing before it gets its name."""
    # run.json, which makes a checkpoint whole, is read and so checked by itself.
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "run.json")
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    (path / FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def newest_undamaged(found: Sequence[Path]) -> Path:
    """The last of the checkpoints, oldest first, whose files are as they were written. Says what it passes over."""
    damages = {path: damage_of(path) for path in reversed(found)}
    for path, damage in damages.items():
        if damage is None:
            return path
        logger.warning("%s is damaged and passed over: %s", path, damage)
    raise UserError(
        f"training.resume: every checkpoint of {found[0].parent} is damaged ({damages[found[-1]]}); restore one, or move "
        "them away to begin anew"
    )


def damage_of(path: Path) -> str | None:
    """What of a checkpoint is not as it was written, by the sizes of its files; None where nothing is."""
    try:
        sizes: dict[str, int] = json.loads((path / FILES).read_text(encoding="utf-8"))
        json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None  # of an earlier version, which did not keep them
    except (OSError, ValueError) as error:
        return f"{FILES} or run.json cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is not there"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes and was written with {size}"
    return None

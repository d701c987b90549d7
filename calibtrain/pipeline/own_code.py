"""The config of a finished run, and whether the code that it names may run: a folder may come from others.

Training a config, or `calibtrain trust`, is the user's word for the code that it names. A mark of that code is kept in the
cache, outside the folder; a run that names other code is not loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.models.loading import cache_directory
from calibtrain.pipeline.scope import plain

FUNCTIONS = ("grader", "extractor", "split")
"""Keys of `task` that may name a function, as package.module:function."""


def config_of_run(output_dir: Path) -> RunConfig:
    """The config of a finished run. Raises UserError where it names code that nobody here has trusted."""
    config = load_config(output_dir / "config.yaml")
    code = named_code(config, output_dir)
    if code and not _mark(code).is_file():
        raise UserError(
            f"{output_dir / 'config.yaml'}: names code that would run here: {'; '.join(told(code))}. If you trust who wrote "
            f"it, say so once: `calibtrain trust {output_dir}`"
        )
    return config


def named_code(config: RunConfig, output_dir: Path) -> dict[str, Any]:
    """What loading the run's model, or grading its answers, would execute; empty where that is calibtrain's own alone."""
    found: dict[str, Any] = {}
    if config.model.trust_remote_code:
        model = output_dir / "model"
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model.glob("*.py"))}
        found["model.trust_remote_code"] = {"files": files, "names": _auto_map(model / "config.json")}
    for key in FUNCTIONS:
        if ":" in (path := getattr(config.task, key, None) or ""):
            found[f"task.{key}"] = path
    return found


def trust(config: RunConfig, output_dir: Path) -> list[str]:
    """Keep the user's word for the code that the run names; what it is, a line each."""
    code = named_code(config, output_dir)
    if code:
        _mark(code).parent.mkdir(parents=True, exist_ok=True)
        _mark(code).write_text(json.dumps(code, indent=2), encoding="utf-8")
    return told(code)


def told(code: dict[str, Any]) -> list[str]:
    """Each of what `named_code` found, in words."""
    lines = []
    for key, value in code.items():
        files = ", ".join(value["files"]) or "code that its config.json names" if isinstance(value, dict) else value
        lines.append(f"{key}: {plain(files)}")
    return lines


def _auto_map(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return None


def _mark(code: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "trusted" / f"{name}.json"

"""What made a run: versions of packages and the commit."""

from __future__ import annotations

import importlib.metadata
import subprocess

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

"""Marks of the weights that a run reads and does not keep, by which a resumed run knows that they are still those."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from calibtrain.config import ModelConfig, RunConfig
from calibtrain.config_rewards import ModelSource
from calibtrain.models.loading import source_file
from calibtrain.models.reward_scorer import reward_file

BLOCKS, BLOCK_BYTES = 256, 4096
"""Of each file: so many places, evenly spaced, of which so much is read. Of 5 GB no 20 MB lie between two of them."""


def rests_on_start(config: RunConfig) -> bool:
    """Whether a run reads its starting weights all along: they are frozen beside adapters, or a loss compares with them."""
    adapted = config.model.lora is not None or config.model.adapter is not None
    return adapted or config.needs_reference_logprobs or config.objective.needs.reference == "live"


@lru_cache(maxsize=4)
def start_mark(config: ModelConfig) -> str:
    """SHA-256 over the sizes and samples of a model's weight files, "" where there are none.

    Found once a process: what lies there later is not what it loaded.
    """
    settings = source_file(config, "config.json")
    return "" if settings is None else _mark(settings.parent)


def reward_marks(config: RunConfig) -> dict[str, str]:
    """The same of each reward model that pays for answers, by its path and revision."""
    paid_by = config.rollouts.paid_by if config.trains_on_rollouts else ()
    models = [one for one in paid_by if isinstance(one, ModelSource)]
    marks = {f"{one.path}@{one.revision or 'main'}": _reward_mark(one) for one in models}
    return {name: mark for name, mark in marks.items() if mark}


@lru_cache(maxsize=8)
def _reward_mark(source: ModelSource) -> str:
    settings = reward_file(source, "config.json")
    return "" if settings is None else _mark(settings.parent)


def _mark(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS + 1):
                stream.seek(max(0, size - BLOCK_BYTES) * block // BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()

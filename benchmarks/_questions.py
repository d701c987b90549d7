"""Questions that runs of several seeds are asked alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SEEDS = 3
"""Most seeds of a study that asks all its runs the same."""


def asked_of_all(settings: Sequence[str]) -> tuple[dict[str, list[Any]], Sequence[Any]]:
    """Splits of the demo's config for seed 0 without what the run of any seed learns from, and seed 0's few shots."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.prepare import prepare

    of_seeds = [prepare(load_config("demo", [f"seed={seed}", *settings])) for seed in range(SEEDS)]
    learnt = {record.key for one in of_seeds for record in one.splits["train"]}
    first = of_seeds[0]
    kept = {
        name: [one for one in rows if one.key not in learnt] for name, rows in first.splits.items() if name != "train"
    }
    return kept, first.shots

"""What a run hands over: the model directory, with a confidence head beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead
from calibtrain.config import RunConfig
from calibtrain.data.reward_text import write_reward_template
from calibtrain.data.templates import Template
from calibtrain.distributed import World, wait_for_main
from calibtrain.models.export import export_adapter, export_model, gathered_weights
from calibtrain.models.reward import RewardLossModel, export_reward_model
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.training.engine import Engine


def export_run(
    config: RunConfig,
    engine: Engine,
    template: Template,
    target: Path,
    scale: float,
    world: World,
    confidence: FittedHead | None = None,
) -> None:
    """Write the model directory whole or not at all: what has its name is a finished run's. Collective.

    A confidence head is written beside it before, with the hash of the very weights.
    """
    engine.module.settle()
    weights = gathered_weights(engine.module.policy, keep=world.is_main)
    head = engine.module.score if isinstance(engine.module, RewardLossModel) else None
    score = {} if head is None else gathered_weights(head, keep=world.is_main)
    partial = target.with_name(target.name + ".partial")

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        if score:
            export_reward_model(weights, score["weight"], config.model, template.tokenizer, template.end_id, partial)
            write_reward_template(config.data, partial)
        else:
            if config.model.lora is not None:  # before it is merged, which is done in place
                shutil.rmtree(target.with_name("adapter"), ignore_errors=True)
                export_adapter(weights, config.model, target.with_name("adapter"))
            export_model(weights, config.model, template.tokenizer, partial, scale, template.end_id)
        if confidence is not None:
            replace(confidence, fingerprint=Fingerprint(weights_hash(partial), template.hash)).save(target.parent)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    wait_for_main(write)

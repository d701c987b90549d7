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
from calibtrain.models.export import export_adapter, export_model
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
    policy, module = engine.module.policy, engine.module
    partial = target.with_name(target.name + ".partial")
    wait_for_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    if isinstance(module, RewardLossModel):
        export_reward_model(policy, module.score, config.model, template.tokenizer, template.end_id, partial)
    else:
        if config.model.lora is not None:
            adapter = target.with_name("adapter")
            wait_for_main(lambda: shutil.rmtree(adapter, ignore_errors=True))
            export_adapter(policy, config.model, adapter)
        export_model(policy, config.model, template.tokenizer, partial, scale, template.end_id)

    def finish() -> None:
        if isinstance(module, RewardLossModel):
            write_reward_template(config.data, partial)
        if confidence is not None:
            replace(confidence, fingerprint=Fingerprint(weights_hash(partial), template.hash)).save(target.parent)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    wait_for_main(finish)

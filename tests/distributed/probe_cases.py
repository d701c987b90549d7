"""Run by test_probe_features under torchrun: collects probe features through a DeepSpeed engine, for each ZeRO stage.

Usage: probe_cases.py FOLDER. Shards go to FOLDER/<ranks>-<stage>.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from calibtrain.confidence.features import Fingerprint, collect_features
from calibtrain.config_file import load_config
from calibtrain.data.templates import Template
from calibtrain.distributed import start_world
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline.prepare import prepare
from calibtrain.training.engine import start_engine

SHARD_SIZE, BATCH = 3, 2


def main(folder: Path) -> None:
    world = start_world()
    for path in sorted(folder.glob("*.yaml")):
        config = load_config(path)
        engine = start_engine(LossModel(Policy(load_model(config.model))), config, world)
        module = engine.module.eval()
        forwards = 0

        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        module.register_forward_pre_hook(count)
        records = prepare(config).splits[
            "calibration"
        ]  # 8 of them: shards of 3, 3 and 2, so that one rank has one more
        features = collect_features(
            module,
            Template(config.data.template, load_tokenizer(config.model)),
            records,
            [str(i) * (i + 1) for i in range(len(records))],
            folder / f"{world.size}-{path.stem}",
            layers=(0, 1, 2),
            depth=2,
            fingerprint=Fingerprint("a" * 64, "b" * 64),
            world=world,
            batch_size=BATCH,
            shard_size=SHARD_SIZE,
            lockstep=engine.stage == 3,
        )
        assert len(features) == len(records)
        if engine.stage == 3:
            assert all(parameter.numel() == 0 for parameter in module.parameters()), "weights were left gathered"
        torch.save(forwards, folder / f"{world.size}-{path.stem}-{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

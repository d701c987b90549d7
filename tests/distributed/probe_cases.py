"""Run by test_probe_features on several ranks: collects probe features through a DeepSpeed engine, for each ZeRO stage.

Usage: probe_cases.py FOLDER. Shards go to FOLDER/<ranks>-<stage>.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from calibtrain.confidence.answered import answer_table
from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.features import Fingerprint, collect_features
from calibtrain.config import EvaluationConfig
from calibtrain.config_file import load_config
from calibtrain.config_tasks import ChoiceTask
from calibtrain.data.templates import Template
from calibtrain.distributed import gather_rows, shard, start_world
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline.prepare import prepare
from calibtrain.tasks.choice import Choice
from calibtrain.training.engine import start_engine

SHARD_SIZE, BATCH = 3, 2
TASK = Choice(ChoiceTask(show="texts"))


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
        scored = options_scored(
            module, Template("plain", load_tokenizer(config.model), task=TASK), records, world, engine
        )
        (folder / f"options-{world.size}-{path.stem}-{world.rank}.json").write_text(json.dumps(scored))


def options_scored(module, template, records, world, engine):
    """Answers among options, of one token and of several, three or five to a question, and their tables."""
    more = ["10", "x", "What is it?", "11"]
    asked = [
        TASK.asked(replace(one, options=(*one.accepted, *more[: 2 + 2 * (i % 2)]))) for i, one in enumerate(records[:7])
    ]
    answerer = Answerer(module, template, EvaluationConfig(batch_size=7), world, lockstep=engine.stage == 3)
    answered = answerer(asked)
    mine = torch.tensor(shard(range(len(asked)), world), dtype=torch.int64)
    table = gather_rows(answer_table(module, answered.select(mine), (0.5, 1.0, 2.0), world.device), world.device)
    return {
        "answers": [answer.as_dict() for answer in answered.answers],
        "table": table.tolist(),
        "features": answered.features.sequence_ids.tolist(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

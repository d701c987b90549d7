"""Run by test_team on several ranks: commands of which rank 0 runs all and the others answer their shares.

Usage: team_cases.py FOLDER. Calibrates FOLDER/plain/run and FOLDER/by_token/run, evaluates FOLDER/parts/run in parts,
and FOLDER/graded/run, whose grader (FOLDER/graders_of_team.py) fails on every rank but the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from calibtrain.config_file import load_config
from calibtrain.distributed import leave_world
from calibtrain.errors import UserError
from calibtrain.models.sharding import is_sharded
from calibtrain.pipeline import calibrate, evaluate
from calibtrain.pipeline.team import joined

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined() as team:
        if team.world.is_main:
            told = {}
            for name in ("plain", "by_token"):
                calibrate.run(folder / name / "run")
            run = folder / "parts" / "run"
            config = load_config(run / "config.yaml")
            evaluate.run(config, model=run / "model", split="test", output=run / "test.jsonl")
            loaded = team.loaded[-1]
            assert all(map(is_sharded, loaded._model.parameters()))
            try:
                print(loaded.model)
            except UserError as error:
                told["whole"] = str(error)
            evaluate.run(
                load_config(folder / "plain" / "run" / "config.yaml"),
                model=None,
                split="test",
                output=folder / "start.jsonl",
            )
            run = folder / "graded" / "run"
            sys.path.append(str(folder))  # where the grader is
            try:
                config = load_config(run / "config.yaml")
                evaluate.run(config, model=run / "model", split="test", output=run / "test.jsonl")
            except UserError as error:
                told["graded"] = str(error)
            (folder / "told.json").write_text(json.dumps(told))
        else:
            sys.path.append(str(folder))
            team.work()
    leave_world()

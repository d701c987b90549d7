"""The runs of benchmarks/knows_when.py: trained once, their graded answers kept; each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from _knows_sources import SOURCES

One = TypeVar("One")
REGIMES = {"fresh": ("data.splits.train=1600", "training.epochs=1"), "repeated": ()}
"""One pass over 1,600 pairs; the demo's own 400 pairs for 4 epochs."""
UNTRAINED = ("raw", *SOURCES)
"""The model that both start from, shown eight examples: on the same questions, and on files that a user could bring."""
NOTHING_TRAINED = (
    "penalties=[]",
    "objective={name: sft}",
    "data.splits={train: 8, calibration: 0, temperature: 8, certification: 8, test: 8}",
)
LAYERS = 8
USES = {"temperature": 512, "certification": 1000, "test": 2000}
FUEL = 8192
"""Graded answers that heads are solved on: the run's calibration questions, and training questions it did not train on."""
ALWAYS = ("tracking.wandb=false", "training.zero_stage=1", "confidence_head=null")
ASKING = ("evaluation.batch_size=128", "tracking.wandb=false")


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a regime and all that is asked of it. `run`: a finished run's directory in the place of training."""

    regime: str
    seed: int
    work: str
    fuel: int = FUEL
    run: str = ""
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its answers are."""
        return Path(self.work) / f"{self.regime}-{self.seed}"

    @property
    def config(self) -> tuple[str, list[str]]:
        """A config and changes to it."""
        if self.run:
            return str(Path(self.run) / "config.yaml"), [*ASKING, *self.changes]
        changes: tuple[str, ...] = REGIMES.get(self.regime, NOTHING_TRAINED)
        if self.regime in SOURCES:
            changes = (*changes, f"data.source={{kind: file, path: {self.folder / 'questions.jsonl'}}}")
        own = [f"seed={self.seed}", *ALWAYS, *changes, f"output_dir={self.folder / 'run'}"]
        return "demo", [*own, *ASKING, *self.changes]

    @property
    def mark(self) -> str:
        """Of all that it is asked to do."""
        return hashlib.sha256(json.dumps([*self.config, self.fuel, LAYERS, USES]).encode()).hexdigest()


def facts_of(job: Job) -> dict[str, Any]:
    """What a finished job left; empty without one, or of other settings."""
    try:
        found: dict[str, Any] = json.loads((job.folder / "facts.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("mark") == job.mark else {}


def start(job: Job) -> str:
    """Run the job in a process of its own, with one thread, unless it is done. How that went."""
    if facts_of(job):
        return "done before"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    values = json.dumps({name: getattr(job, name) for name in Job.__slots__})
    code = "import json, sys, _knows_runs as runs; runs.work(runs.Job(**json.loads(sys.argv[1])))"
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", code, values], env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{job.regime}, seed {job.seed}: failed, see {job.folder / 'log'}")
    return f"trained in {facts_of(job)['training_seconds']:.0f} s, or before"


def work(job: Job) -> None:
    """Train, answer, and keep what was answered; the model itself goes."""
    import torch
    from _graded_store import answer_into

    from calibtrain.confidence.features import default_layers, depth_of
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import train
    from calibtrain.pipeline.evaluate import Loaded
    from calibtrain.pipeline.prepare import prepare

    torch.set_num_threads(1)
    if job.regime in SOURCES:
        SOURCES[job.regime](job.folder / "questions.jsonl")
    config = load_config(*job.config)
    output, seconds = Path(job.run or job.folder / "run"), 0.0
    raw = job.regime in UNTRAINED
    if not job.run and not raw and not (output / "model" / "config.json").is_file():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
        clock = time.process_time()
        train.run(config)
        seconds = time.process_time() - clock
    loaded = Loaded(config, None if raw else output / "model")
    layers = tuple(default_layers(depth_of(loaded.model), LAYERS))
    for use, records in questions(job).items():
        answer_into(job.folder / use, loaded, records, layers, prepare(config).shots if raw else ())
    facts = {"mark": job.mark, "layers": layers, "training_seconds": seconds, "scale": scale_of(output)}
    facts["objective"] = config.objective.name
    (job.folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(job.folder / "run", ignore_errors=True)


def scale_of(output: Path) -> float:
    """The scale of the logits that the calibration term gave the model; 1 where it had none."""
    try:
        lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return 1.0
    found = [one["train/logit_scale"] for one in map(json.loads, lines) if one.get("train/logit_scale")]
    return float(found[-1]) if found else 1.0


def questions(job: Job) -> dict[str, list[Any]]:
    """Questions by their use, disjoint. The splits are drawn popular questions first, so all are read equally deep."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.prepare import prepare

    name, changes = job.config
    own = prepare(load_config(name, changes))
    depth = min(1.0, USES["test"] / own.available["test"])
    rng = np.random.default_rng(job.seed)
    trained = {record.id for record in own.splits["train"]}
    sizes: dict[str, Any] = {use: round(depth * own.available[use]) for use in USES}
    sizes |= {"train": "null", "calibration": len(own.splits["calibration"])}
    text = ", ".join(f"{split}: {size}" for split, size in sizes.items())
    wide = prepare(load_config(name, [*changes, f"data.splits={{{text}}}"])).splits
    found = {use: chosen(wide[use], size, rng) for use, size in USES.items()}
    spare = {record.id: record for record in wide["train"] if record.id not in trained}
    found["fuel"] = [*own.splits["calibration"], *spare.values()][: job.fuel]
    return found


def chosen(records: Sequence[One], count: int, rng: np.random.Generator) -> list[One]:
    """So many of them at random, in their order."""
    return [records[row] for row in sorted(rng.permutation(len(records))[:count])]

"""What reinforcement learning does to confidence, and what each remedy does about it: no temperature is fitted afterwards.

    python benchmarks/rl_calibration.py --work runs/rl --json benchmarks/results/rl_calibration.json

SmolLM2-135M learns the geography questions by SFT. Each arm then starts from there, with other training questions: GRPO paid
for right answers alone, GRPO with the likelihood's score in its loss, GRPO with stated confidence (RLCR), PPO on a reward
model, and DPO, the last ones plain and with a remedy. Measured are greedy answers to test questions that nothing else has
seen: by the likelihood of the answer, and by what it states where it does. --validate measures on other questions, on which
the settings were chosen.

A run that is finished leaves --work/seed-S/ARM.json and is not run again while its settings stay the same, so that an
interrupted study goes on with the same command. --arms, --seeds and --steps select; an arm brings what it starts from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _report import write_json
from _rl_measures import confidences, divergence, head_beside, metrics
from _rl_tables import mean_row, print_tables, summary

SIZES = "data.splits={{train: {train}, calibration: 512, temperature: 512, certification: 1000, test: 1000}}"
SFT_ROWS = 1600
"""Questions that SFT learns; of the 15,000 training questions the arms draw from all."""
ALWAYS = [
    "data.source={kind: geography}",
    "tracking.wandb=false",
    "training.zero_stage=1",
    "evaluation.batch_size=128",
    "training.log_every=10",
]
SFT = ["training.micro_batch_size=16", "training.global_batch_size=16", SIZES.format(train=SFT_ROWS)]
RL = [
    "training.micro_batch_size=8",
    "training.global_batch_size=8",
    "training.schedule=constant",
    "training.learning_rate=2.0e-5",
    "training.log_every=1",  # a line tells the last round alone
    SIZES.format(train="null"),
]
STATED = ["evaluation.max_new_tokens=24"]  # "(confidence: 70%)" comes behind the answer
PAIRS = ["training.micro_batch_size=8", "training.global_batch_size=8", SIZES.format(train=800)]
STEPS = 60
"""Of each arm with rollouts; DPO and the reward models read 800 pairs once."""
KL_QUESTIONS = 500
"""Test questions with a sampled answer each, for the divergence from the model that an arm began with."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: a shipped config with changes, from the model of an earlier run. `{name}` in a change is that run's model."""

    config: str
    changes: tuple[str, ...]
    after: str | None = "sft"
    stated: bool = False  # it states a confidence behind its answer
    answers: bool = True  # False: a reward model
    steps: bool = True  # whether --steps is its number of steps

    @property
    def needs(self) -> tuple[str, ...]:
        """Runs that come before it."""
        named = [one for change in self.changes for one in re.findall(r"\{(\w+)\}", change)]
        return tuple(dict.fromkeys([*([self.after] if self.after else []), *named]))


def arm(config: str, *changes: str | Sequence[str], **facts: Any) -> Arm:
    """An arm from changes that may come in lists."""
    flat = [one for part in changes for one in ([part] if isinstance(part, str) else part)]
    return Arm(config, tuple(flat), **facts)


def on_reward_model(path: str, *changes: str, **facts: Any) -> Arm:
    """PPO, which earns what the reward model at `path` gives."""
    paid = ["objective={name: ppo}", f"rollouts={{reward: model, reward_model: {path}}}"]
    return arm("grpo_geography", RL, paid, *changes, **facts)


HELD = "objective.beta=1.0"
SAID = ("rollouts.confidence=stated", "rollouts.decoupled=false")


def shifted(form: str) -> tuple[str, str]:
    """PPO-C in one of its forms."""
    return "rollouts.reward=ppo_c", f"rollouts.ppo_c.form={form}"


ARMS: dict[str, Arm] = {
    "sft": arm("sft", SFT, after=None, steps=False),
    "sft_stated": arm("sft", SFT, STATED, after=None, steps=False, stated=True),
    "rl_accuracy": arm("grpo_geography", RL, "rollouts.reward=accuracy"),
    "rl_log": arm("grpo_geography", RL, "rollouts.reward=log"),
    "rl_log_accuracy": arm("grpo_geography", RL, "rollouts={reward: log, accuracy_weight: 0.5}"),
    "rl_head": arm(
        "grpo_geography", RL, "rollouts={reward: log, confidence: head}", "confidence_head={fit_questions: 2048}"
    ),
    "rl_stated": arm("grpo_rlcr", RL, after="sft_stated", stated=True),
    "dpo": arm("dpo", PAIRS, "penalties=[]", steps=False),
    "dpo_scored": arm("dpo", PAIRS, steps=False),
    # The reward models read plain answers: wrong ones of a model that states a confidence would be told by the statement.
    "reward_model": arm("reward_model", PAIRS, answers=False, steps=False),
    "reward_model_m": arm("reward_model", PAIRS, "objective.confidence_statements=added", answers=False, steps=False),
    "ppo_reward_model": on_reward_model("{reward_model}"),
    "ppo_reward_model_scored": on_reward_model("{reward_model}", "penalties=[{name: answer_score, moves: all}]"),
    # The same, held near where it starts: a nat of reward pays for a nat of distance, so that what earns most in the end is
    # the start's probability times exp(reward), as if the reward were evidence.
    "ppo_held": on_reward_model("{reward_model}", HELD),
    "ppo_held_scored": on_reward_model("{reward_model}", HELD, "penalties=[{name: answer_score, moves: all}]"),
    # Stated confidence, held alike: nothing done about it, a reward model that reads statements, a reward that they shift.
    "ppo_stated": on_reward_model("{reward_model}", HELD, *SAID, after="sft_stated", stated=True),
    "ppo_m": on_reward_model("{reward_model_m}", HELD, *SAID, after="sft_stated", stated=True),
    "ppo_c": on_reward_model("{reward_model}", HELD, *SAID, *shifted("threshold"), after="sft_stated", stated=True),
    "ppo_c_proper": on_reward_model("{reward_model}", HELD, *SAID, *shifted("proper"), after="sft_stated", stated=True),
}
CHOSEN = (
    "sft", "rl_accuracy", "rl_log", "rl_head", "rl_stated", "dpo", "dpo_scored",
    "ppo_reward_model", "ppo_reward_model_scored", "ppo_held", "ppo_held_scored",
    "ppo_stated", "ppo_m", "ppo_c", "ppo_c_proper",
)  # fmt: skip
"""Arms of the study; the others are asked for by name."""


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--work", type=Path, required=True, help="runs are kept here and gone on with")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(CHOSEN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the arms with rollouts")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to every run, for a quick look"
    )
    parser.add_argument("--validate", action="store_true", help="measure on the split that settings are chosen on")
    parser.add_argument("--keep-models", action="store_true", help="keep the models of the arms, 270 MB each")
    parser.add_argument("--collect", action="store_true", help="run nothing: report what --work holds so far")
    arguments = parser.parse_args()
    work, names = arguments.work.resolve(), with_needs(arguments.arms)
    for seed in arguments.seeds if not arguments.collect else ():
        for name in names:
            job = Job(name, seed, str(work), arguments.steps, arguments.set, arguments.validate, arguments.keep_models)
            print(f"{name}, seed {seed}: {start(job)}", flush=True)
    found = [found for seed in arguments.seeds for name in names if (found := read(work, name, seed)) and "n" in found]
    if not found:
        raise SystemExit(f"{work}: no arm is measured yet")
    rows = [mean_row(name, [one for one in found if one["arm"] == name]) for name in names]
    rows = [row for row in rows if row["seeds"]]
    print_tables(rows)
    result = summary(found)
    print(json.dumps(result, indent=2))
    if arguments.json:
        write_json(
            arguments.json,
            [{"part": "mean", **row} for row in rows] + [{"part": "seed", **one} for one in found],
            result,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed, as a process of its own gets it."""

    name: str
    seed: int
    work: str
    steps: int
    changes: Sequence[str]
    validate: bool = False
    keep_models: bool = False

    @property
    def directory(self) -> Path:
        """Where the seed's runs are."""
        return Path(self.work) / f"seed-{self.seed}"

    @property
    def settings(self) -> list[str]:
        """Overrides of the arm's config, in which other runs still stand by name."""
        one = ARMS[self.name]
        steps = [f"training.max_steps={self.steps}"] if one.steps else []
        return [f"seed={self.seed}", *ALWAYS, *one.changes, *(STATED if one.stated else []), *steps, *self.changes]

    @property
    def mark(self) -> str:
        """Hash of all that the run is asked to do, and of the runs that it starts from."""
        one = ARMS[self.name]
        before = [Job(name, self.seed, self.work, self.steps, self.changes).mark for name in one.needs]
        parts = [one.config, shipped(one.config), self.settings, before, one.stated, one.answers, self.validate]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shipped(name: str) -> str:
    """A shipped config without its comments, which change nothing."""
    lines = (Path(__file__).parents[1] / "configs" / f"{name}.yaml").read_text("utf-8").splitlines()
    return "\n".join(line for line in (line.partition("#")[0].rstrip() for line in lines) if line)


def with_needs(names: Iterable[str]) -> list[str]:
    """The arms and the runs that they start from, each behind what it needs."""
    ordered: list[str] = []
    for name in names:
        ordered += [one for one in (*with_needs(ARMS[name].needs), name) if one not in ordered]
    return ordered


def read(work: Path, name: str, seed: int) -> dict[str, Any]:
    """What a finished run left; empty without one."""
    try:
        found: dict[str, Any] = json.loads((work / f"seed-{seed}" / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def start(job: Job) -> str:
    """Run the job in a process of its own unless it is done. How that went, in words."""
    left = read(Path(job.work), job.name, job.seed)
    wanted = any(job.name in ARMS[name].needs for name in ARMS)
    if left.get("mark") == job.mark and (not wanted or (job.directory / job.name / "model").is_dir()):
        return f"done before ({left['seconds']:.0f} s)"
    code = "import json, sys, rl_calibration as study; study.work(study.Job(**json.loads(sys.argv[1])))"
    values = json.dumps({field: getattr(job, field) for field in Job.__slots__})
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    job.directory.mkdir(parents=True, exist_ok=True)
    with (job.directory / f"{job.name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", code, values], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise SystemExit(f"{job.name}, seed {job.seed}: failed, see {log.name}")
    found = read(Path(job.work), job.name, job.seed)
    return f"{found['steps']} steps, {found['seconds']:.0f} s of training, {found['measuring']:.0f} s of measuring"


def work(job: Job) -> None:
    """Train one run, measure it, and write what was found."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import train
    from calibtrain.pipeline.provenance import git_hash

    one, output = ARMS[job.name], job.directory / job.name
    settings = [*job.settings, f"output_dir={output}"]
    for name in one.needs:
        settings = [text.replace(f"{{{name}}}", str(job.directory / name / "model")) for text in settings]
    if one.after is not None:
        settings.append(f"model.source={job.directory / one.after / 'model'}")
    if job.name == "sft_stated":
        settings += stated_data(job)
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    config = load_config(one.config, settings)
    started, used = time.perf_counter(), time.process_time()
    model = train.run(config)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = max(line["step"] for line in logged)
    found: dict[str, Any] = {"arm": job.name, "seed": job.seed, "mark": job.mark, "code": git_hash(), "steps": steps}
    found |= {"seconds": seconds, "cpu_seconds": used}
    answers = steps * config.training.global_batch_size * config.sequences_per_record
    found["answers_a_second"] = answers / stepping(logged)
    found["curve"] = [rollout_means(line) for line in logged if "train/rollouts/reward" in line]
    measuring = time.perf_counter()
    if one.answers:
        found |= measured(job, model)
    found["measuring"] = time.perf_counter() - measuring
    partial = job.directory / f"{job.name}.json.partial"
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not job.keep_models and not any(job.name in ARMS[name].needs for name in ARMS):
        shutil.rmtree(output / "model")
    os.replace(partial, job.directory / f"{job.name}.json")


def stepping(logged: Sequence[dict[str, Any]]) -> float:
    """Seconds in the steps themselves, sampling included: without loading, exporting and a start's compilation."""
    lines = [line for line in logged if "train/seconds_per_step" in line]
    ends = [0, *(line["step"] for line in lines)]
    return sum(
        line["train/seconds_per_step"] * (line["step"] - before) for line, before in zip(lines, ends, strict=False)
    )


def rollout_means(line: dict[str, Any]) -> dict[str, float]:
    """What a line of metrics says of the sampled answers."""
    return {key: line[key] for key in line if key == "step" or key.startswith("train/rollouts/")}


def stated_data(job: Job) -> list[str]:
    """The rows that teach to state a confidence, of training questions alone, so that nothing is held out of them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import stated_confidence

    path = stated_confidence.write(SFT_ROWS, job.directory / "stated.jsonl", job.seed)
    empty = "{train: null, calibration: 0, temperature: 0, certification: 0, test: 0}"
    return [f"data.source={{kind: file, path: {path}}}", f"data.splits={empty}"]


def measured(job: Job, model: Path) -> dict[str, Any]:
    """How the model answers the test questions, by each of its confidences, and how far it went from where it began."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.evaluate import Loaded
    from calibtrain.pipeline.prepare import prepare

    one = ARMS[job.name]
    # The questions are the geography's, also where the format was learned from a file.
    sizes = SIZES.format(train=0)
    stated = STATED if one.stated else []
    asking = load_config("sft", [f"seed={job.seed}", *ALWAYS, *stated, *job.changes, sizes])
    splits = prepare(asking).splits
    test, certifying = ("calibration", "temperature") if job.validate else ("test", "certification")
    loaded = Loaded(asking, model)
    head = head_beside(model, loaded)
    both = {
        split: loaded.answer(splits[split], layers=() if head is None else head.layers) for split in (test, certifying)
    }
    answered = {split: one.answers for split, one in both.items()}
    found: dict[str, Any] = {"n": len(answered[test]), "split": test}
    if head is not None:
        told = [(head.score(one).values.tolist(), [bool(a.correct) for a in one.answers]) for one in both.values()]
        found |= metrics("head", *told)
    found |= confidences(answered[test], answered[certifying], loaded, splits[test], splits[certifying], one.stated)
    if one.after is not None:
        begin = job.directory / one.after / "model"
        found["kl"] = divergence(loaded, Loaded(asking, begin), splits[test][:KL_QUESTIONS], job.seed)
    return found


if __name__ == "__main__":
    main()

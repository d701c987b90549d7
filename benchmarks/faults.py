"""What becomes of runs that are killed, stopped, starved of disk or handed damaged files: resumed bit for bit, or told.

    python benchmarks/faults.py --json benchmarks/results/faults.json

Runs of a tiny model, one and two ranks with gloo, each with its own way to train (ZeRO 0 to 3, LoRA, own wrong answers
sampled first, rounds of reinforcement learning). Each is trained once undisturbed. Then it is trained again and killed
(SIGKILL to all, or to one rank) at moments drawn over its whole length, import, sampling, a step, a checkpoint, the
export, half of them from the first checkpoint on; each time it is started anew with training.resume=auto, until it ends. Its
exported weights and its logged numbers must be those of the undisturbed run. Some are killed and gone on with on another
number of ranks and at another ZeRO stage, and back: their weights must be those of the undisturbed run to 1e-6. SIGTERM must
end it with exit code 75. Other faults: a disk that takes no large file, a checkpoint cut short, a clock that is set back, a
tracker that cannot be reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models and the launches of the tests

import torch
from _report import print_table, write_json
from safetensors.torch import load_file

from tests.distributed.jobs import metrics, train, write_job
from tests.distributed.ranks import descendants, environment

LIMIT = 240.0
"""Seconds after which a start is taken to hang."""
LORA = {"lora": {"r": 2, "dropout": 0.2}}
RL = {"objective": {"name": "grpo"}, "rollouts": {"group_size": 2, "reward": "log", "steps_per_round": 2}}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, sections
    "zero0": (1, {"training": {"zero_stage": 0}}),
    "zero1, LoRA": (2, {"training": {"zero_stage": 1}, "model": LORA}),
    "zero2, own wrong answers": (1, {"training": {"zero_stage": 2}, "objective": {"name": "orpo"}}),
    "zero3": (2, {"training": {"zero_stage": 3}}),
    "grpo, rounds of two steps": (1, {"training": {"zero_stage": 2}, "penalties": [], **RL}),
}
ELSEWHERE: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, changes; of kinds without dropout
    "zero0": (2, ("training.zero_stage=2",)),
    "zero3": (1, ("training.zero_stage=1", "training.deepspeed=null", "training.micro_batch_size=2")),
    "grpo, rounds of two steps": (2, ("training.zero_stage=1",)),
}
WITHOUT_WARNING = {"PYTHONWARNINGS": "ignore"}


@dataclass
class Tally:
    """What was done to the runs of one kind, and what became of them."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Case:
    """A config, its undisturbed run, and starts of the same run elsewhere."""

    def __init__(self, folder: Path, number: int, kind: str) -> None:
        self.ranks, sections = KINDS[kind]
        self.elsewhere = ELSEWHERE.get(kind)
        self.folder = folder / f"kind{number}"
        self.sections = dict(sections)
        self.whole = self.job("whole")
        started = time.monotonic()
        code, output = self.start(self.whole)
        if code:
            raise RuntimeError(f"{kind}: the undisturbed run failed:\n{output[-3000:]}")
        self.seconds = time.monotonic() - started

    def job(self, name: str) -> Path:
        """Config of the same run with an output directory of its own."""
        sections = {key: dict(value) if isinstance(value, dict) else value for key, value in self.sections.items()}
        training = {"checkpoint_every": 1, "max_steps": 6, **sections.pop("training")}
        model = {"source": str(self.folder / "tiny"), "dtype": "fp32", **sections.pop("model", {})}
        return write_job(self.folder, name, training=training, model=model, **sections)

    def start(
        self,
        config: Path,
        disturb: Wait | None = None,
        moved: bool = False,
        **env: str,
    ) -> tuple[int, str]:
        """Exit code and output of one start with training.resume=auto; `disturb` gets the process. -999: it hung.

        `moved`: in the other layout.
        """
        ranks, changes = self.elsewhere if moved and self.elsewhere is not None else (self.ranks, ())
        log = self.folder / "log.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                train(ranks, config, "training.resume=auto", *changes),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment(**WITHOUT_WARNING, **env),
                cwd=self.folder,
                start_new_session=True,
            )
            code: int | None = None
            try:
                if disturb is not None:
                    disturb(process)
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                code = -999
            finally:
                end([process.pid, *descendants(process.pid)])
                process.wait()
        return code, log.read_text("utf-8", "replace")

    def differs(self, config: Path, moved: bool = False) -> str | None:
        """How a finished run differs from the undisturbed one, None where it does not; one that was `moved` by over 1e-6."""
        here, there = self.folder / config.stem, self.folder / "whole"
        if not (here / "model" / "model.safetensors").is_file():
            return "no model"
        mine, theirs = (load_file(one / "model" / "model.safetensors") for one in (here, there))
        atol = 1e-6 if moved else 0.0
        if mine.keys() != theirs.keys() or not all(
            torch.allclose(mine[name], theirs[name], rtol=0.0, atol=atol) for name in mine
        ):
            return "other weights"
        if not moved and logged(here) != logged(there):
            return "other numbers in metrics.jsonl"
        left = [str(one.relative_to(here)) for one in here.rglob("*.partial")]
        return f"left behind: {', '.join(left)}" if left else None


def logged(output: Path) -> dict[int, dict[str, Any]]:
    """The last line logged of each step."""
    return {line["step"]: line for line in metrics(output) if line["event"] == "log"}


def end(pids: list[int], how: signal.Signals = signal.SIGKILL) -> None:
    """Signal processes that may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


Wait = Callable[["subprocess.Popen[bytes]"], None]


def wait_for(output: Path, checkpoints: int, seconds: float) -> Wait:
    """Wait until a run has so many checkpoints, and `seconds` more; or until it has ended."""

    def wait(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and len(list((output / "checkpoints").glob("step-*/run.json"))) < checkpoints:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    return wait


def killing(wait: Wait, one_rank: bool = False) -> Wait:
    """Wait, then kill every process, or the first rank found alone; a process that has ended is left."""

    def disturb(process: subprocess.Popen[bytes]) -> None:
        wait(process)
        if process.poll() is None:
            ranks = descendants(process.pid)
            end(ranks[:1] if one_rank and ranks else [process.pid, *ranks])

    return disturb


def stopping(wait: Wait) -> Wait:
    """Wait, then SIGTERM to all, as a scheduler does."""

    def disturb(process: subprocess.Popen[bytes]) -> None:
        wait(process)
        if process.poll() is None:
            end([process.pid, *descendants(process.pid)], signal.SIGTERM)

    return disturb


def until_finished(case: Case, tally: Tally, rng: random.Random, how: str, number: int, most: int) -> int:
    """One run that is killed or stopped up to `most` times, then left to end. Returns how often it was."""
    config, done = case.job(f"{how}{number}"), 0
    while True:
        last = done >= most
        moved = how == "move" and done % 2 == 1
        wait = wait_for(case.folder / config.stem, 0, rng.uniform(0.3 * case.seconds, 1.05 * case.seconds))
        if rng.random() < 0.5:
            there = len(list((case.folder / config.stem / "checkpoints").glob("step-*/run.json")))
            wait = wait_for(case.folder / config.stem, min(there + 1, 2), rng.uniform(0.0, 2.0))
        if last:
            code, output = case.start(config, moved=moved)
        elif how == "term":
            code, output = case.start(config, stopping(wait))
        else:
            code, output = case.start(config, killing(wait, one_rank=case.ranks > 1 and rng.random() < 0.3), moved)
        if code == 0:
            break
        if code == -999:
            tally.counts["hangs"] += 1
            tally.problems.append(f"{tally.kind}: hung\n{output[-1500:]}")
            return done
        if last:
            tally.counts["lost"] += done
            tally.problems.append(f"{tally.kind}: could not go on\n{output[-1500:]}")
            return done
        done += 1
        if how == "term" and "stopped as asked" in output:
            tally.counts["told, with a checkpoint"] += 1
    found = case.differs(config, moved=how == "move")
    if found is None:
        tally.counts["equal_elsewhere" if how == "move" else "bit_exact_resumes"] += done
    else:
        tally.counts["lost"] += done
        tally.problems.append(f"{tally.kind}: {found}")
    return done


def other_faults(case: Case) -> list[dict[str, Any]]:
    """Faults that are done to one run each: (what, whether it was told, whether the run came to its end bit for bit)."""
    rows = []

    def row(what: str, config: Path, told: bool) -> None:
        found = case.differs(config)
        rows.append({"fault": what, "told": told, "then": found or "bit for bit"})

    config = case.job("cut")
    case.start(config, killing(wait_for(case.folder / "cut", 2, 0.0)))
    kept = sorted((case.folder / "cut" / "checkpoints").glob("step-???????"))
    if len(kept) > 1:
        shard = max((kept[-1] / "engine").iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(shard, shard.stat().st_size // 2)
    _, output = case.start(config)
    row("newest checkpoint cut in half", config, "is damaged and passed over" in output)

    config = case.job("full")
    limited = case.folder / "limited"
    limited.mkdir()
    (limited / "sitecustomize.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
    )
    code, output = case.start(config, PYTHONPATH=f"{limited}:{environment()['PYTHONPATH']}")
    told = "no checkpoint at step" in output and code != 0 and not (case.folder / "full" / "model").exists()
    case.start(config)
    row("no file beyond 60 kB, later room again", config, told)

    config = case.job("clock")
    (case.folder / "back").mkdir()
    (case.folder / "back" / "sitecustomize.py").write_text(
        "import time\nreal, calls = time.time, [0]\n"
        "def time_going_back():\n    calls[0] += 1\n    return real() - 86400.0 * (calls[0] > 200)\n"
        "time.time = time_going_back\n"
    )
    code, _ = case.start(config, PYTHONPATH=f"{case.folder / 'back'}:{environment()['PYTHONPATH']}")
    row("the clock is set back a day", config, code == 0)

    config = case.job("tracker")
    text = config.read_text().replace("wandb: false", "wandb: true\n  mode: online")
    config.write_text(text)
    code, output = case.start(
        config, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="10"
    )
    row("W&B cannot be reached", config, code == 0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument(
        "--moves", type=int, default=20, help="kills after which a run goes on in another layout, or back"
    )
    parser.add_argument("--a-run", type=int, default=4, help="at most so many kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tallies, rng = [], random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        cases = {kind: Case(Path(name), number, kind) for number, kind in enumerate(given.kinds)}
        for kind, case in cases.items():
            tally = Tally(kind)
            tallies.append(tally)
            movable = [one for one in cases if one in ELSEWHERE]
            for how, wanted in (("kill", given.kills), ("term", given.terms), ("move", given.moves)):
                among = movable if how == "move" else list(cases)
                if kind not in among:
                    continue
                place = among.index(kind)
                share = wanted // len(among) + (place < wanted % len(among))
                number = 0
                while tally.counts[how] < share:
                    most = min(given.a_run, share - tally.counts[how])
                    done = until_finished(case, tally, rng, how, number, most)
                    tally.counts[how] += done
                    number += 1
                    if tally.problems:
                        break
            print(f"{kind}: {dict(tally.counts)}", flush=True)
        others = other_faults(cases[given.kinds[0]])
    names = ("kill", "term", "told, with a checkpoint", "bit_exact_resumes", "move", "equal_elsewhere", "lost", "hangs")
    rows: list[dict[str, Any]] = [{"kind": one.kind, **{name: one.counts[name] for name in names}} for one in tallies]
    print_table("killed and stopped", rows)
    print_table("other faults", others)
    for tally in tallies:
        for problem in tally.problems:
            print(problem)
    total = {name: sum(row[name] for row in rows) for name in names}
    summary = {
        "kills": total["kill"],
        "terms": total["term"],
        "bit_exact_resumes": total["bit_exact_resumes"],
        "moves": total["move"],
        "equal_elsewhere": total["equal_elsewhere"],
        "lost": total["lost"],
        "hangs": total["hangs"],
    }
    print(json.dumps(summary))
    if given.json:
        write_json(given.json, [*rows, *others], summary)


if __name__ == "__main__":
    main()

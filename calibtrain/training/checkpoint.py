"""Checkpoints that resume bit for bit, and on another number of ranks or ZeRO stage up to the rounding of sums.

A checkpoint is written beside its final name and renamed when every rank has finished, so that a directory with the
final name is always whole. It holds safetensors and JSON alone: `engine/` the weights and the optimiser's moments in pieces
(`shards`), rank<k> what each rank keeps beside them (`rank_state`), run.json what all share.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from calibtrain.config import RunConfig
from calibtrain.distributed import World, all_agree, gather_lists, on_main
from calibtrain.errors import UserError
from calibtrain.hooks.base import HookList
from calibtrain.models.start_mark import rests_on_start, reward_marks, start_mark
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.averaging import WeightAverage
from calibtrain.training.best import Best
from calibtrain.training.changing_examples import ChangingExamples
from calibtrain.training.checkpoint_files import damage_of, newest_undamaged, note_files
from calibtrain.training.engine import Engine
from calibtrain.training.engine_state import follow, module_state, state_of, take_up, take_up_module_state
from calibtrain.training.rank_state import load_rank_states, rank_state, read_rank_state, set_random_state, write_json
from calibtrain.training.shards import Shards, on_host, write_shard
from calibtrain.training.trajectory import changed_keys, rearranged, refused

logger = logging.getLogger(__name__)

LAYOUT = 2
"""Of a checkpoint's files; 1, which had no number, were DeepSpeed's own."""
ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Progress:
    """What the loop itself must remember: everything else is a function of the step."""

    step: int = 0  # finished optimiser steps
    skipped_in_a_row: int = 0
    changes: tuple[str, ...] = ()  # keys that shape the trajectory and were changed, each with its step
    best: Best | None = None  # evaluation, whose checkpoint is kept


@dataclass
class Writing:
    """A checkpoint whose files this rank writes, in `thread` while training goes on, or has written."""

    step: int
    final: Path
    keep: int
    kept: Path | None  # of the best evaluation
    problem: str | None = None  # which kept all ranks from beginning
    error: Exception | None = None  # of this rank
    thread: threading.Thread | None = None

    @property
    def partial(self) -> Path:
        """Where it lies until it is whole."""
        return self.final.with_name(self.final.name + ".partial")


def begin_checkpoint(
    directory: Path,
    progress: Progress,
    engine: Engine,
    stream: AnswerStream | None,
    average: WeightAverage | None,
    hooks: HookList,
    config: RunConfig,
    data_hash: str,
    world: World,
    rollouts: ChangingExamples | None = None,
    *,
    background: bool = False,
) -> Writing:
    """Write this rank's files of `directory`/step-N; in the `background` a copy, held in host memory. Collective.

    `end_checkpoint` comes next, on all ranks, before another begins.
    """
    best = None if progress.best is None else checkpoint_of(directory, progress.best.step)
    writing = Writing(progress.step, checkpoint_of(directory, progress.step), config.training.keep_checkpoints, best)
    writing.problem = on_main(lambda: _failure(_begin, writing.partial))
    if writing.problem is not None:
        return writing
    more = {"module": module_state(engine)} if world.is_main else {}
    counted = {} if average is None else {"averaged": average.count}
    state = rank_state(stream, rollouts, hooks, more | counted, world)
    pieces, wholes, facts = state_of(engine, world)
    pieces += [] if average is None else average.pieces()
    if background:
        pieces, wholes = [on_host(one) for one in pieces], [on_host(one) for one in wholes]
    told = _run_state(progress, config, data_hash, engine, world)

    def write() -> None:
        try:
            write_shard(writing.partial / ENGINE, world.rank, world.size, pieces, wholes, facts)
            state.write(writing.partial, world.rank)
            if world.is_main:
                write_json(writing.partial / "run.json", told)
        except Exception as error:  # it must not keep this rank from what the others wait at
            writing.error = error

    if background:
        writing.thread = threading.Thread(target=write, name="checkpoint")
        writing.thread.start()
    else:
        write()
    return writing


def end_checkpoint(writing: Writing, world: World, *, wait: bool = True) -> tuple[bool, Path | None]:
    """(whether every rank has written, where the checkpoint is), and give it its name then. Collective.

    Without `wait` it may be that they have not. No path, with a warning, where a rank could not write (disk full): older
    checkpoints stay, training can go on. What is older than the last `keep_checkpoints` is dropped, but for the best.
    """
    if writing.thread is not None:
        if wait:
            writing.thread.join()
        if not all_agree(not writing.thread.is_alive(), world.device):
            return False, None
    problem, error = writing.problem, writing.error
    if error is not None:
        logger.warning("rank %d could not write checkpoint %s: %s", world.rank, writing.partial, error)
    if problem is None:
        if all_agree(error is None, world.device):
            problem = on_main(lambda: _failure(_complete, writing.partial, writing.final, writing.keep, writing.kept))
        else:
            problem = "a rank could not write"
            on_main(lambda: shutil.rmtree(writing.partial, ignore_errors=True))
    if problem is None:
        return True, writing.final
    if world.is_main:
        told = "no checkpoint at step %d (%s); the last good one stays: free some disk space"
        logger.warning(told, writing.step, problem)
    return True, None


def find_checkpoint(config: RunConfig, world: World, data_hash: str | None) -> Path | None:
    """Checkpoint that training.resume names, checked against this run; None to start from the beginning.

    data_hash: None while the data are not known yet.

    Raises UserError when it is no whole checkpoint, or was written by another config or on another data set.
    """
    resume = config.training.resume
    if resume is None:
        return None
    if resume == "auto":
        found = complete_checkpoints(config.output_dir / "checkpoints")
        if not found:
            return None
        path = newest_undamaged(found)
    else:
        path = Path(resume)
        if not isfile(path / "run.json"):
            inner = complete_checkpoints(path if path.name == "checkpoints" else path / "checkpoints")
            if not inner:
                raise UserError(f"training.resume: {path} is not a whole checkpoint (it has no run.json)")
            path = newest_undamaged(inner)
        elif damage := damage_of(path):
            raise UserError(f"training.resume: {path} is damaged: {damage}")
    run = _read_run(path)
    if run.get("layout") != LAYOUT:
        raise UserError(
            f"training.resume: {path} was written by another version, in a layout that this one does not read; go on with "
            "that version, or begin anew from the exported weights with model.source"
        )
    differing = refused(run["config"], config)
    if differing:
        raise UserError(
            f"training.resume: {path} was written by another config; these keys differ: " + "; ".join(differing)
        )
    if data_hash is not None and run["data_hash"] != data_hash:
        raise UserError(
            f"training.resume: {path} was trained on other data: data.source, or the wrong answers sampled for it, "
            "have changed since"
        )
    if rests_on_start(config) and run.get("start", "") not in ("", start_mark(config.model)):
        raise UserError(
            f"training.resume: {path} was trained beside other weights than model.source: {config.model.source} holds now; "
            "put those back, or begin anew"
        )
    paid, marks = run.get("rewards", {}), reward_marks(config)
    if changed := [name for name, mark in marks.items() if paid.get(name, mark) != mark]:
        raise UserError(
            f"training.resume: {path} was paid by other weights than the reward model {changed[0]} holds now; put those "
            "back, or begin anew"
        )
    return path


def load_checkpoint(
    path: Path,
    engine: Engine,
    stream: AnswerStream | None,
    average: WeightAverage | None,
    hooks: HookList,
    world: World,
    config: RunConfig,
    rollouts: ChangingExamples | None = None,
) -> Progress:
    """Restore everything from a checkpoint that `find_checkpoint` accepted; the last thing before the loop. Collective.

    Raises UserError, on every rank, when one of them does not see its part of it.
    """
    if not all_agree(_is_seen(path), world.device):
        raise UserError(
            f"training.resume: {path} is not seen whole by every process: output_dir must be on a disk that all machines "
            "share"
        )
    run = _read_run(path)
    step, written_by = run["step"], run["world_size"]
    try:
        load_weights(path, engine, average)
    except UserError as error:
        raise UserError(
            f"training.resume: {error}; where it is damaged, move it away, and training.resume=auto takes the one before"
        ) from error
    own = load_rank_states(path, written_by, stream, rollouts, hooks, world)
    set_random_state(own, written_by, config.seed, step, world)  # last: loading draws random numbers
    changed = changed_keys(run["config"], config)
    elsewhere = rearranged(run["config"], config, written_by, world.size)
    if world.is_main:
        for one in changed:
            logger.warning("another trajectory from here on, after step %d: %s", step, one)
        for one in elsewhere:
            logger.info("the same run in another layout, after step %d: %s", step, one)
    best = run.get("best")
    return Progress(
        step,
        run["skipped_in_a_row"],
        (*run.get("changes", ()), *(f"after step {step}: {one}" for one in [*changed, *elsewhere])),
        None if best is None else Best(**best),
    )


def _is_seen(path: Path) -> bool:
    """Whether this process sees a checkpoint whole."""
    try:
        ranks = range(_read_run(path)["world_size"])
    except UserError:
        return False
    whole = all((path / f"rank{rank}{ending}").is_file() for rank in ranks for ending in (".json", ".safetensors"))
    return whole and damage_of(path) is None


def load_weights(path: Path, engine: Engine, average: WeightAverage | None = None) -> None:
    """Put a checkpoint's weights, the state of their optimiser and of the losses, in place, and of `average`. Collective.

    Raises UserError, on every rank, where one of them cannot.
    """
    engine.module.settle()
    problems = []
    try:
        first = read_rank_state(path, 0)
        with Shards(path / ENGINE) as shards:
            take_up(engine, shards)
            if average is not None:
                average.load(first["averaged"], shards.read)
        take_up_module_state(engine, first["module"])
    except UserError as error:
        problems.append(str(error))
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        problems.append(f"{path} cannot be loaded ({type(error).__name__}: {error})")
    if told := gather_lists(problems):
        raise UserError(told[0])
    follow(engine)


def checkpoint_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, of a run's checkpoints in `directory`."""
    return directory / f"step-{step:07d}"


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"training.resume: {path / 'run.json'} cannot be read: {error}; delete {path}") from error
    return run


def complete_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    every = directory.glob("step-*") if isdir(directory) else ()  # False too of a name that is too long
    found = [path for path in every if re.fullmatch(r"step-\d+", path.name)]
    return sorted(path for path in found if (path / "run.json").is_file())


def _failure(call: Callable[..., None], *arguments: Any) -> str | None:
    """What the file system said against it, if anything: rank 0 tells it to the others, who would wait for it."""
    try:
        call(*arguments)
    except OSError as error:
        return str(error)
    return None


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / ENGINE).mkdir(parents=True)


def _complete(partial: Path, final: Path, keep: int, best: Path | None) -> None:
    note_files(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _drop_others(final.parent, final, keep, best)


def _drop_others(directory: Path, newest: Path, keep: int, best: Path | None = None) -> None:
    """Delete what is older than the last `keep`, and what a run that went back to an earlier step had written beyond it."""
    found = complete_checkpoints(directory)
    place = found.index(newest) + 1
    for path in [*found[: max(0, place - keep)], *found[place:]]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _run_state(progress: Progress, config: RunConfig, data_hash: str, engine: Engine, world: World) -> dict[str, Any]:
    """What is the same on every rank. run.json makes a checkpoint whole, and comes last."""
    return {
        "layout": LAYOUT,
        "step": progress.step,
        "skipped_in_a_row": progress.skipped_in_a_row,
        "changes": list(progress.changes),
        "best": progress.best and asdict(progress.best),
        "world_size": world.size,
        "zero_stage": engine.stage,
        "data_hash": data_hash,
        "start": start_mark(config.model) if world.is_main and rests_on_start(config) else "",
        "rewards": reward_marks(config) if world.is_main else {},
        "config": config.resolved(),
    }

"""Checkpoints that resume bit for bit: the engine's shards, and per rank what DeepSpeed does not keep.

A checkpoint is written beside its final name and renamed when every rank has finished, so that a directory with the
final name is always whole. DeepSpeed's own shards are pickles: resume only from directories that your own runs wrote.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calibtrain.config import RunConfig
from calibtrain.distributed import World, all_agree, on_main
from calibtrain.errors import UserError
from calibtrain.hooks.base import HookList
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.averaging import WeightAverage
from calibtrain.training.best import Best
from calibtrain.training.changing_examples import ChangingExamples
from calibtrain.training.checkpoint_files import damage_of, newest_undamaged, note_files
from calibtrain.training.engine import Engine
from calibtrain.training.trajectory import changed_keys, refused

logger = logging.getLogger(__name__)

AVERAGE = "average/"
"""Before the names of a rank's averaged weights among its tensors."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the loop itself must remember: everything else is a function of the step."""

    step: int = 0  # finished optimiser steps
    skipped_in_a_row: int = 0
    changes: tuple[str, ...] = ()  # keys that shape the trajectory and were changed, each with its step
    best: Best | None = None  # evaluation, whose checkpoint is kept


def save_checkpoint(
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
) -> Path | None:
    """Write `directory`/step-N and drop the oldest beyond keep_checkpoints, but for the best. Collective.

    Returns None, with a warning, when a rank could not write (disk full): older checkpoints stay, training can go on.
    """
    final = checkpoint_of(directory, progress.step)
    kept = None if progress.best is None else checkpoint_of(directory, progress.best.step)
    partial = final.with_name(final.name + ".partial")
    problem = on_main(lambda: _failure(_begin, partial))
    if problem is None:
        error = _write_engine(engine, partial)
        if error is None:
            try:
                _write_rank_state(partial, engine, stream, average, hooks, world, rollouts)
                if world.is_main:
                    _write_run_state(partial, progress, config, data_hash, world)
            except (OSError, SafetensorError) as caught:
                error = caught
        if error is not None:
            logger.warning("rank %d could not write checkpoint %s: %s", world.rank, partial, error)
        if all_agree(error is None, world.device):
            problem = on_main(lambda: _failure(_complete, partial, final, config.training.keep_checkpoints, kept))
        else:
            problem = "a rank could not write"
            on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    if problem is None:
        return final
    if world.is_main:
        told = "no checkpoint at step %d (%s); the last good one stays: free some disk space"
        logger.warning(told, progress.step, problem)
    return None


def find_checkpoint(config: RunConfig, world: World, data_hash: str | None) -> Path | None:
    """Checkpoint that training.resume names, checked against this run; None to start from the beginning.

    data_hash: None while the data are not known yet.

    Raises UserError when it is no whole checkpoint, or was written by another world size, config or data set.
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
        if not (path / "run.json").is_file():
            inner = complete_checkpoints(path if path.name == "checkpoints" else path / "checkpoints")
            if not inner:
                raise UserError(f"training.resume: {path} is not a whole checkpoint (it has no run.json)")
            path = newest_undamaged(inner)
        elif damage := damage_of(path):
            raise UserError(f"training.resume: {path} is damaged: {damage}")
    run = _read_run(path)
    if run["world_size"] != world.size:
        raise UserError(
            f"training.resume: {path} was written by {run['world_size']} process(es), this run has {world.size}; start "
            "as many, or begin anew from its exported weights with model.source"
        )
    differing = refused(run["config"], config)
    if differing:
        raise UserError(
            f"training.resume: {path} was written by another config; these keys differ: " + "; ".join(differing)
        )
    if data_hash is not None and run["data_hash"] != data_hash:
        raise UserError(f"training.resume: {path} was trained on other data: data.source has changed since")
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
    whole = all((path / f"rank{world.rank}{ending}").is_file() for ending in (".json", ".safetensors"))
    if not all_agree(whole, world.device):
        raise UserError(
            f"training.resume: {path} is not seen whole by every process: output_dir must be on a disk that all machines "
            "share"
        )
    try:
        load_weights(path, engine)
    except UserError as error:
        raise UserError(
            f"training.resume: {error}; move it away, and training.resume=auto takes the one before"
        ) from error
    tensors = load_file(path / f"rank{world.rank}.safetensors")
    state = json.loads((path / f"rank{world.rank}.json").read_text(encoding="utf-8"))
    if stream is not None:
        stream.load_state_dict(state["stream"])
    if rollouts is not None:
        rollouts.load_state_dict(state["rollouts"])
    if average is not None:
        if not any(name.startswith(AVERAGE) for name in tensors):
            raise UserError(
                f"training.resume: {path} keeps its averaged weights as an earlier version did; go on with that version, or "
                "begin anew from its weights with model.source"
            )
        average.load({name.removeprefix(AVERAGE): one for name, one in tensors.items() if name.startswith(AVERAGE)})
    hooks.load_state_dict(_with_tensors(state["hooks"], tensors))
    run = _read_run(path)
    # Last: loading draws random numbers.
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], world.device)
    changed = [f"after step {run['step']}: {one}" for one in changed_keys(run["config"], config)]
    for one in changed if world.is_main else []:
        logger.warning("another trajectory from here on, %s", one)
    best = run.get("best")
    return Progress(
        run["step"],
        run["skipped_in_a_row"],
        (*run.get("changes", ()), *changed),
        None if best is None else Best(**best),
    )


def load_weights(path: Path, engine: Engine) -> None:
    """Put a checkpoint's weights, and the state of their optimiser, in place. Collective. UserError where they cannot be."""
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    engine.module.settle()
    try:
        engine.deepspeed.load_checkpoint(str(path), tag="engine", load_module_strict=not frozen)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be loaded ({reason})") from error


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
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
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
    partial.mkdir(parents=True)


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


def _write_engine(engine: Engine, partial: Path) -> Exception | None:
    """DeepSpeed's shards. A failed write must not keep this rank from the barriers that the others wait at."""
    writer = engine.deepspeed.checkpoint_engine
    errors: list[OSError] = []
    original = writer.save

    def guarded(state_dict: Any, path: str) -> Any:
        try:
            return original(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            errors.append(OSError(str(error)))
            return None

    writer.save = guarded
    try:
        # What is frozen (LoRA's base) comes from model.source, also on resume.
        engine.deepspeed.save_checkpoint(str(partial), tag="engine", save_latest=False, exclude_frozen_parameters=True)
    finally:
        writer.save = original
    return errors[0] if errors else None


def _write_rank_state(
    partial: Path,
    engine: Engine,
    stream: AnswerStream | None,
    average: WeightAverage | None,
    hooks: HookList,
    world: World,
    rollouts: ChangingExamples | None,
) -> None:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if average is not None:
        tensors |= {f"{AVERAGE}{name}": one for name, one in average.tensors().items()}
    if world.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(world.device)
    plain = _without_tensors(hooks.state_dict(), "hooks", tensors)
    # Clones, because safetensors refuses tensors that share memory.
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        partial / f"rank{world.rank}.safetensors",
    )
    state = {
        name: None if one is None else one.state_dict() for name, one in (("stream", stream), ("rollouts", rollouts))
    }
    _write_json(partial / f"rank{world.rank}.json", {"hooks": plain, **state})


def _write_run_state(
    partial: Path,
    progress: Progress,
    config: RunConfig,
    data_hash: str,
    world: World,
) -> None:
    """What is the same on every rank. run.json makes a checkpoint whole, and comes last."""
    _write_json(
        partial / "run.json",
        {
            "step": progress.step,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "changes": list(progress.changes),
            "best": progress.best and asdict(progress.best),
            "world_size": world.size,
            "data_hash": data_hash,
            "config": config.resolved(),
        },
    )


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(inner, f"{path}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(inner, f"{path}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_tensors(inner, tensors) for inner in value]
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")

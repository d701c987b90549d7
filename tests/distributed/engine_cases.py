"""Run by test_engine on several ranks: evaluation, export, skipped steps and failed writes, for each ZeRO stage.

Usage: engine_cases.py FOLDER. Does every FOLDER/*.yaml; each rank writes FOLDER/results-<ranks>-<rank>.pt.
"""

from __future__ import annotations

import errno
import logging
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibtrain import shared_files
from calibtrain.config import RunConfig, SFTConfig
from calibtrain.config_file import load_config
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_records
from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template, template_of
from calibtrain.distributed import World, barrier, check_alike, leave_world, on_main, start_world
from calibtrain.errors import UserError
from calibtrain.hooks.base import Hook, HookList
from calibtrain.models.export import export_model, gathered_weights
from calibtrain.models.loading import load_tokenizer
from calibtrain.models.loss_model import DecodeStep, ScoreStep
from calibtrain.pipeline import examples as examples_module
from calibtrain.pipeline import prepare as prepare_module
from calibtrain.pipeline import train as pipeline
from calibtrain.pipeline.prepare import Prepared, prepare
from calibtrain.training import checkpoint as checkpoint_module
from calibtrain.training.checkpoint import Progress, complete_checkpoints, load_checkpoint
from calibtrain.training.held_out import encode_held_out
from calibtrain.training.trainer import Trainer

HOMES = ((0, 1), (2, 0), (0, 3))  # of both ranks: no cache at all, rank 1's alone is filled, rank 0's alone
QUESTIONS = {"uneven": 5, "fewer than ranks": 1, "none": 0}


def begin(config: RunConfig, world: World) -> tuple[Trainer, Prepared]:
    """A trainer as pipeline.train makes it, without the hooks that write files."""
    prepared = prepare(config)
    template = Template(config.data.template, load_tokenizer(config.model))
    torch.manual_seed(config.seed + world.rank)
    engine, layout = pipeline.begin_engine(config, template, world)
    examples = pipeline.training_examples(config, prepared, template, engine.module, world)
    validation = encode_held_out(prepared.splits["validation"], config, template)
    trainer = pipeline._trainer(config, prepared, template, engine, world, layout, examples, validation)
    return replace(trainer, output_dir=config.output_dir), prepared


def answered(trainer: Trainer, world: World) -> dict[str, Any]:
    """Answers of all ranks for each number of questions, and the logit scale that the term solves for."""
    found: dict[str, Any] = {}
    for name, count in QUESTIONS.items():
        result = trainer.answerer(trainer.evaluation_questions[:count])
        found[name] = {
            "answers": [(one.question_id, one.text, one.logprob, one.correct) for one in result.answers],
            "hidden": result.features.hidden.float(),
            "sequence_ids": result.features.sequence_ids,
        }
    assert trainer.stream is not None
    assert trainer.held_out is not None
    found["loss"] = trainer.held_out.measure(trainer.engine.module)
    trainer.stream.round(1)
    found["scale"] = trainer.engine.module.policy.scale
    return found


def exported(trainer: Trainer, config: RunConfig, world: World, target: Path) -> torch.Tensor:
    """Export the engine's weights at a scale of 0.7; returns the engine's own log-probs of some tokens at it."""
    policy = trainer.engine.module.policy
    policy.scale = 0.7
    tokenizer = trainer.answerer.template.tokenizer
    trainer.engine.module.eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        states = [trainer.engine.module(_decode(ids[:, : end + 1]))[0] for end in range(ids.shape[1] - 1)]
        hidden = torch.cat(states)
        logprobs = trainer.engine.module(ScoreStep(hidden, ids[0, 1:], torch.ones(1)))[:, 0]
    export_model(policy, config.model, tokenizer, target, policy.scale)
    return logprobs


def _decode(ids: torch.Tensor) -> DecodeStep:
    return DecodeStep({"input_ids": ids, "use_cache": False})


class Steps(Hook):
    """Remembers what each step came to."""

    name = "steps"

    def __init__(self) -> None:
        self.skipped: list[bool] = []

    def on_step(self, record: Any) -> None:
        """Keep it."""
        self.skipped.append(record.skipped)


def poisoned(config: RunConfig, world: World) -> dict[str, Any]:
    """Train on data with one record whose tokens have a NaN embedding; on rank 1's share only, in one step."""
    trainer, _ = begin(config, world)
    # The last token of the vocabulary occurs in no text: only the records changed below meet it.
    bad = trainer.engine.module.policy.causal_model.config.vocab_size - 1
    trainer.engine.module.policy.causal_model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, output: torch.where((inputs[0] == bad)[..., None], torch.nan, output)
    )
    victims = [step_indices(1, 4, len(trainer.examples), config.seed)[-1]]
    if config.name.endswith("always"):
        victims = list(range(len(trainer.examples)))
    examples = list(trainer.examples)
    for index in victims:
        examples[index] = tuple(replace(one, ids=(bad, *one.ids[1:])) for one in examples[index])
    steps = Steps()
    trainer = replace(trainer, examples=examples, hooks=HookList([steps]), stream=None, output_dir=config.output_dir)
    before = gathered_weights(trainer.engine.module.policy, keep=True)
    message = ""
    try:
        trainer.fit(Progress())
    except UserError as error:
        message = str(error)
    after = gathered_weights(trainer.engine.module.policy, keep=True)
    return {
        "skipped": steps.skipped,
        "victims": [trainer.origins[index] for index in victims],
        "message": message,
        "finite": all(bool(one.isfinite().all()) for one in after.values()),
        "changed": any(not before[name].equal(after[name]) for name in after),
    }


def full_disk(config: RunConfig, world: World) -> dict[str, Any]:
    """Rank 1's writes fail at the second checkpoint; at the third they work again; at the fourth rank 0 cannot begin.

    In the background the first and the third are written when the step after has been trained.
    """
    trainer, _ = begin(config, world)
    plain = checkpoint_module.write_shard
    saved = []
    behind = {step: threading.Event() for step in (2, 6)} if config.training.checkpoint_in_background else {}

    def full(directory: Path, *what: Any) -> None:
        for step, stepped in behind.items():
            if f"step-{step:07d}" in str(directory):
                assert stepped.wait(100)
        if world.rank == 1 and "step-0000004" in str(directory):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(directory, *what)

    checkpoint_module.write_shard = full
    begin_writing = checkpoint_module._begin

    def refused(partial: Path) -> None:
        if "step-0000008" in partial.name:
            raise OSError(errno.EROFS, "Read-only file system")
        begin_writing(partial)

    checkpoint_module._begin = refused

    class Kept(Hook):
        name = "kept"

        def on_step(self, record: Any) -> None:
            if record.step - 1 in behind:  # only now may that checkpoint be written
                behind[record.step - 1].set()
            saved.append((record.step, [one.name for one in complete_checkpoints(config.output_dir / "checkpoints")]))

    trainer = replace(trainer, hooks=HookList([Kept()]))
    progress = trainer.fit(Progress())
    checkpoint_module._begin, checkpoint_module.write_shard = begin_writing, plain
    found = sorted(one.name for one in (config.output_dir / "checkpoints").iterdir())
    return {"kept": saved, "step": progress.step, "left": found}


def sampled(config: RunConfig, world: World, folder: Path) -> dict[str, Any]:
    """The rejected answers of the training records, as each rank gets them with each pair of homes."""
    found, calls = [], []
    plain = pipeline.sample_answers
    pipeline.sample_answers = lambda *args, **options: calls.append(1) or plain(*args, **options)
    for homes in HOMES:
        home = folder / f"home{homes[world.rank]}"
        prepare_module.cache_directory = lambda home=home: home
        prepared = prepare(config)
        pipeline._add_rejected(config, prepared, template_of(config, load_tokenizer(config.model)), world)
        found.append([record.rejected for record in prepared.splits["train"]])
    pipeline.sample_answers = plain
    kept = sorted(home.name for home in folder.glob("home*") if list(home.rglob("*.json")))
    return {"rejected": found, "sampled": len(calls), "kept": kept, "messages": disagreements(world, folder)}


def kept_tokens(config: RunConfig, world: World, folder: Path) -> dict[str, Any]:
    """Who encodes the training records, with one cache for both ranks and one each, and what both learn from; then how a
    rank that fails is told, and an output_dir that is not shared.
    """
    prepared = prepare(config)
    template = template_of(config, load_tokenizer(config.model))
    plain = encode_records(prepared.splits["train"], template, config.data.max_length, False, DropReport())
    made: list[str] = []
    once, patience = examples_module._encode, shared_files.LOOKS
    examples_module.ENCODED_ANEW, shared_files.LOOKS = 0, 3
    examples_module._encode = lambda *args: made.append(place) or once(*args)
    same = []
    for place in ("together", f"apart{world.rank}", "together"):
        examples_module.cache_directory = lambda place=place: folder / place
        found = pipeline.training_examples(config, prepared, template, None, world)  # type: ignore[arg-type]
        same.append(list(found) == plain)
    told, place = [], "failing"

    def fails(*args: Any) -> Any:
        raise UserError("the template refuses it") if world.rank else RuntimeError("no")

    if world.rank:
        examples_module._encode = fails
    examples_module.cache_directory = lambda: folder / f"failing{world.rank}"
    for call in (
        lambda: pipeline.training_examples(config, prepared, template, None, world),  # type: ignore[arg-type]
        lambda: shared_files.check_shared(folder / f"out{world.rank}", "output_dir", world),
        lambda: shared_files.check_shared(folder / "out", "output_dir", world),
        lambda: shared_files.check_shared(Path(f"/proc/{world.rank}"), "output_dir", world),
    ):
        try:
            call()
            told.append("")
        except UserError as error:
            told.append(str(error))
    examples_module._encode, shared_files.LOOKS, examples_module.ENCODED_ANEW = once, patience, 2000
    return {"made": made, "same": same, "told": told, "left": sorted(one.name for one in folder.glob("out*"))}


def disagreements(world: World, folder: Path) -> list[str]:
    """What each rank is told where one of them sees something else."""

    def refuse() -> None:
        raise UserError("rank 0 says no")

    mine = folder / f"seen-by-{world.rank}"
    mine.mkdir(exist_ok=True)
    for name in ("rank0.json", "rank0.safetensors", "rank1.json", "rank1.safetensors")[: 4 - world.rank]:
        (mine / name).touch()
    (mine / "run.json").write_text('{"world_size": 2}')
    check_alike({"config": "a", "data set": "b"}, world)
    calls: list[Any] = [
        lambda: on_main(refuse),
        lambda: check_alike({"config": "a", "data set": f"b{world.rank}"}, world),
        lambda: load_checkpoint(mine, None, None, None, HookList([]), world, RunConfig()),  # type: ignore[arg-type]
    ]
    told = []
    for call in calls:
        try:
            call()
        except UserError as error:
            told.append(str(error))
    return told


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = start_world()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("calibtrain").addHandler(handler)
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("*.yaml")):
        config, name = load_config(path), path.stem
        lines.clear()
        if name.startswith("poison") and world.size == 2:
            results[name] = poisoned(config, world)
        elif name.startswith("disk") and world.size == 2:
            results[name] = full_disk(config, world)
        elif name == "homes" and world.size == 2:
            results[name] = sampled(config, world, folder)
            sft = config.model_copy(update={"objective": SFTConfig()})
            results[name]["tokens"] = kept_tokens(sft, world, folder)
        elif name.startswith("stage"):
            trainer, _ = begin(config, world)
            results[name] = answered(trainer, world)
            results[name]["logprobs"] = exported(trainer, config, world, folder / f"{name}-{world.size}")
        if name in results:
            results[name]["warnings"] = list(lines)
    torch.save(results, folder / f"results-{world.size}-{world.rank}.pt")
    barrier()
    leave_world()

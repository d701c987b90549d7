"""Which checkpoints a run may continue from."""

import json

import pytest
import torch

from calibtrain.config import RunConfig
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import settled
from calibtrain.models.start_mark import reward_marks, start_mark
from calibtrain.training.checkpoint import LAYOUT, _drop_others, complete_checkpoints, find_checkpoint
from calibtrain.training.checkpoint_files import note_files
from calibtrain.training.trajectory import rearranged
from tests.tiny import write_tiny_model
from tests.unit.models.test_reward_scorer import write as write_reward_model

TWO = World(0, 2, 0, torch.device("cpu"))


def config(output, resume="auto", **training):
    return RunConfig(output_dir=output, training={"resume": resume, **training})


def write(output, step, whole=True, **changes):
    path = output / "checkpoints" / f"step-{step:07d}"
    path.mkdir(parents=True)
    run = {
        "layout": LAYOUT,
        "step": step,
        "skipped_in_a_row": 0,
        "world_size": 2,
        "data_hash": "abc",
        "config": settled(config(output)).resolved(),
    }
    if whole:
        (path / "run.json").write_text(json.dumps({**run, **changes}))
    return path


def test_auto_takes_the_newest_whole_one_or_none(tmp_path):
    assert find_checkpoint(config(tmp_path), TWO, "abc") is None
    assert find_checkpoint(config(tmp_path, None), TWO, "abc") is None
    write(tmp_path, 2)
    newest = write(tmp_path, 10)
    write(tmp_path, 12, whole=False)
    (tmp_path / "checkpoints" / "step-0000014.partial").mkdir()
    assert find_checkpoint(config(tmp_path), TWO, "abc") == newest
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-0000002", "step-0000010"]
    for named in (newest, newest.parent, tmp_path):
        assert find_checkpoint(config(tmp_path, named), TWO, "abc") == newest


def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path, caplog):
    first, second, third = (write(tmp_path, step) for step in (2, 4, 6))
    for path in (first, second, third):
        (path / "engine").mkdir()
        (path / "engine" / "shard.pt").write_bytes(b"x" * 100)
        note_files(path)
    assert find_checkpoint(config(tmp_path), TWO, "abc") == third
    (third / "engine" / "shard.pt").write_bytes(b"x" * 60)
    (second / "engine" / "shard.pt").unlink()
    assert find_checkpoint(config(tmp_path), TWO, "abc") == first
    assert "engine/shard.pt has 60 bytes and was written with 100" in caplog.text
    assert "engine/shard.pt is not there" in caplog.text
    with pytest.raises(UserError, match=r"step-0000006 is damaged: engine/shard.pt has 60"):
        find_checkpoint(config(tmp_path, third), TWO, "abc")
    (first / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        find_checkpoint(config(tmp_path), TWO, "abc")


def test_what_does_not_shape_the_trajectory_may_change(tmp_path):
    path = write(tmp_path, 2)
    changed = config(tmp_path, log_every=1, checkpoint_every=7, keep_checkpoints=5)
    assert find_checkpoint(changed, TWO, "abc") == path


def test_weights_that_a_checkpoint_does_not_hold_must_still_be_there(tmp_path):
    """Adapters go on beside the frozen weights that they were trained on, which come from the source again."""
    first, other = (write_tiny_model(tmp_path / f"m{seed}", seed=seed) for seed in (0, 1))
    lora = {"output_dir": tmp_path, "model": {"source": str(first), "lora": {}}, "training": {"resume": "auto"}}
    adapted, whole = (
        RunConfig.model_validate({**lora, "model": {**lora["model"], **one}}) for one in ({}, {"lora": None})
    )
    path = write(tmp_path, 2, config=settled(adapted).resolved(), start=start_mark(adapted.model))
    assert find_checkpoint(adapted, TWO, "abc") == path
    moved = start_mark(adapted.model.model_copy(update={"source": str(other)}))
    write(tmp_path, 4, config=settled(adapted).resolved(), start=moved)
    with pytest.raises(UserError, match=r"beside other weights than model\.source"):
        find_checkpoint(adapted, TWO, "abc")
    path = write(tmp_path, 6, config=settled(whole).resolved(), start=moved)
    assert find_checkpoint(whole, TWO, "abc") == path  # which a checkpoint holds all of


def test_a_reward_model_must_still_be_the_one_that_paid(tmp_path):
    judge = write_reward_model(tmp_path / "judge")
    rollouts = {"reward": "sources", "sources": [{"kind": "grade"}, {"kind": "model", "path": str(judge)}]}
    run = {"objective": {"name": "grpo"}, "rollouts": rollouts, "training": {"resume": "auto"}}
    paid = RunConfig.model_validate({"output_dir": tmp_path, **run})
    marks = reward_marks(paid)
    assert list(marks) == [f"{judge}@main"]
    path = write(tmp_path, 2, config=settled(paid).resolved(), rewards=marks)
    assert find_checkpoint(paid, TWO, "abc") == path
    write(tmp_path, 4, config=settled(paid).resolved(), rewards={f"{judge}@main": "another"})
    with pytest.raises(UserError, match=r"paid by other weights than the reward model .*judge"):
        find_checkpoint(paid, TWO, "abc")
    (judge / "model.safetensors").write_bytes(b"another")
    assert reward_marks(paid) == marks  # what lies there now has paid for nothing in this process
    rollouts["sources"][1]["path"] = str(tmp_path / "gone")
    assert reward_marks(RunConfig.model_validate(run)) == {}  # told with what else the sources lack


def test_another_layout_of_the_same_run_is_taken_and_named(tmp_path):
    path = write(tmp_path, 2, world_size=8)
    changed = config(tmp_path, zero_stage=3, offload_parameters=True, micro_batch_size=1)
    assert find_checkpoint(changed, TWO, "abc") == path
    assert rearranged(json.loads((path / "run.json").read_text())["config"], changed, 8, 2) == [
        "8 process(es) before, 2 now",
        "training.micro_batch_size was 4, is 1",
        "training.zero_stage was 2, is 3",
        "training.offload_parameters was False, is True",
    ]


@pytest.mark.parametrize(
    ("changes", "training", "data_hash", "words"),
    [
        ({"layout": 1}, {}, "abc", ["written by another version", "model.source"]),
        ({}, {"learning_rate": 0.5}, "abc", ["training.learning_rate was 2e-05, is 0.5"]),
        ({}, {"global_batch_size": 16}, "abc", ["training.global_batch_size was 8, is 16"]),
        ({}, {}, "another", ["other data"]),
    ],
)
def test_another_run_is_refused_and_the_message_names_what_differs(tmp_path, changes, training, data_hash, words):
    write(tmp_path, 2, **changes)
    with pytest.raises(UserError) as caught:
        find_checkpoint(config(tmp_path, **training), TWO, data_hash)
    assert all(word in str(caught.value) for word in [*words, "training.resume"])


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a whole checkpoint"):
        find_checkpoint(config(tmp_path, tmp_path), TWO, "abc")


def test_a_damaged_run_json_is_refused(tmp_path):
    (write(tmp_path, 2) / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json"):
        find_checkpoint(config(tmp_path), TWO, "abc")


@pytest.mark.parametrize(("newest", "left"), [(8, [6, 8]), (6, [4, 6]), (2, [2])])
def test_the_newest_written_and_the_one_before_it_stay(tmp_path, newest, left):
    """Also where the run went back: what it had written beyond that step is no longer its own."""
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    _drop_others(folder, folder / f"step-{newest:07d}", 2)
    assert [int(path.name[5:]) for path in complete_checkpoints(folder)] == left


def test_that_of_the_best_evaluation_stays_as_well(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    _drop_others(folder, folder / "step-0000008", 2, best=folder / "step-0000002")
    assert [int(path.name[5:]) for path in complete_checkpoints(folder)] == [2, 6, 8]

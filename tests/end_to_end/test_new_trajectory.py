"""A run is gone on with under another schedule only when that is asked for, and what changed is kept."""

import json
import os

import pytest

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.training.checkpoint import complete_checkpoints, find_checkpoint
from calibtrain.training.output_directory import check_output_dir
from tests.distributed.jobs import metrics, write_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import train

    job = write_job(tmp_path_factory.mktemp("job"), penalties=[], training={"zero_stage": 1, "max_steps": 4})
    train.run(load_config(job))
    return job


def again(job, *changes):
    return load_config(job, ["training.resume=auto", *changes])


def world():
    import torch

    from calibtrain.distributed import World

    return World(0, 1, 0, torch.device("cpu"))


def test_changes_are_refused_with_the_way_on(finished):
    with pytest.raises(UserError, match=r"max_steps was 4, is 6 \(training\.new_trajectory=true goes on"):
        check_output_dir(again(finished, "training.max_steps=6"))
    other = again(finished, "training.new_trajectory=true", "training.weight_decay=0.1")
    with pytest.raises(UserError, match=r"weight_decay was 0\.0, is 0\.1$"):
        find_checkpoint(other, world(), None)


def test_what_shapes_no_step_may_change(finished):
    assert check_output_dir(again(finished, "model.gradient_checkpointing=true", "training.checkpoint_every=1"))


def test_a_key_that_an_earlier_version_did_not_know_is_no_difference(finished):
    config = again(finished)
    path = complete_checkpoints(config.output_dir / "checkpoints")[-1] / "run.json"
    kept = path.read_text()
    run = json.loads(kept)
    del run["config"]["task"]
    path.write_text(json.dumps(run))
    try:
        assert find_checkpoint(config, world(), None) == path.parent
    finally:
        path.write_text(kept)


def test_it_goes_on_and_says_what_changed(finished):
    from calibtrain.pipeline import train

    config = again(finished, "training.new_trajectory=true", "training.max_steps=6", "training.learning_rate=0.0005")
    train.run(config)
    assert [line["step"] for line in metrics(config.output_dir) if line["event"] == "log"] == [1, 2, 3, 4, 5, 6]
    last = json.loads((complete_checkpoints(config.output_dir / "checkpoints")[-1] / "run.json").read_text())
    assert last["step"] == 6
    assert last["changes"] == [
        "after step 4: training.learning_rate was 0.001, is 0.0005",
        "after step 4: training.max_steps was 4, is 6",
    ]

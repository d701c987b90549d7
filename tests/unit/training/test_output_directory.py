"""An output_dir is one run's: gone on with when asked, never written over by another."""

import json
import os

import pytest

from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import settled
from calibtrain.training.output_directory import check_output_dir, check_replaceable, check_same_data


def config(output, resume=None, name="run", **training):
    return RunConfig(output_dir=output, name=name, training={"resume": resume, **training})


def left_behind(output, steps=(), model=False, records="abc"):
    """What a run leaves: checkpoints, a model when it has ended, and what made it."""
    for step in steps:
        path = output / "checkpoints" / f"step-{step:07d}"
        path.mkdir(parents=True)
        (path / "run.json").write_text("{}")
    if model:
        (output / "model").mkdir(parents=True)
        (output / "model" / "config.json").write_text("{}")
    dump_config(settled(config(output)), output / "config.yaml")
    (output / "run.json").write_text(json.dumps({"records_hash": records}))
    return set(output.rglob("*"))


def told(check, *arguments):
    with pytest.raises(UserError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "give another output_dir" in message
    return message


def test_nothing_to_lose_is_no_obstacle(tmp_path):
    assert not check_output_dir(config(tmp_path / "none"))
    left_behind(tmp_path)  # it failed before its first checkpoint
    (tmp_path / "checkpoints" / "step-0000002.partial").mkdir(parents=True)
    (tmp_path / "model.partial").mkdir()
    assert not check_output_dir(config(tmp_path))
    assert not check_output_dir(config(tmp_path, "auto"))
    assert not check_replaceable(config(tmp_path, name="another"))


def test_an_interrupted_run_is_gone_on_with_only_when_asked(tmp_path):
    before = left_behind(tmp_path, steps=(2, 14))
    message = told(check_output_dir, config(tmp_path))
    assert "after step 14" in message
    assert "training.resume=auto" in message
    told(check_output_dir, config(tmp_path, tmp_path.parent / "elsewhere" / "checkpoints" / "step-0000002"))
    assert not check_output_dir(config(tmp_path, "auto"))
    assert not check_output_dir(config(tmp_path, tmp_path / "checkpoints" / "step-0000002"))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("steps", [(), (6,)])
def test_a_finished_run_is_told_and_never_written_over(tmp_path, steps):
    left_behind(tmp_path, steps, model=True)
    assert "finished run" in told(check_output_dir, config(tmp_path))
    assert check_output_dir(config(tmp_path, "auto", name="other words", log_every=1))
    message = told(check_output_dir, config(tmp_path, "auto", learning_rate=0.5))
    assert "training.learning_rate was 2e-05, is 0.5" in message
    assert "more" in told(
        check_output_dir,
        config(
            tmp_path,
            "auto",
            learning_rate=0.5,
            epochs=9,
            zero_stage=1,
            weight_decay=0.5,
            max_grad_norm=0.5,
            adam_epsilon=1e-3,
        ),
    )
    (tmp_path / "config.yaml").unlink()
    assert "cannot be read" in told(check_output_dir, config(tmp_path, "auto"))


def test_a_finished_run_on_other_data_is_another(tmp_path):
    left_behind(tmp_path, model=True)
    check_same_data(tmp_path, "abc")
    assert "other data" in told(check_same_data, tmp_path, "another")


def test_only_a_run_of_the_same_name_is_replaced(tmp_path):
    left_behind(tmp_path, model=True)
    assert check_replaceable(config(tmp_path, learning_rate=0.5))
    assert "another run (run)" in told(check_replaceable, config(tmp_path, name="demo"))
    (tmp_path / "config.yaml").write_text("[")
    assert "of unknown name" in told(check_replaceable, config(tmp_path))


def test_what_cannot_be_written_is_told_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for output, words in (
        (tmp_path / "file" / "out", "is a file"),
        (tmp_path / ("x" * 300), "File name too long"),
        *([(locked / "out", "no permission")] if os.geteuid() else []),  # root may write everywhere
    ):
        for look in (check_output_dir, check_replaceable):
            with pytest.raises(UserError, match=words):
                look(config(output))
    assert not check_output_dir(config(tmp_path / "new" / "and" / "deep"))

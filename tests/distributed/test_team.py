"""Several processes answer for one command: the answers, and all that is made of them, are those of one process."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests.distributed.ranks import environment, forked, run
from tests.end_to_end.runs import finished_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SPLITS = {"train": 4, "calibration": 4, "temperature": 21, "certification": 19, "test": 7}
CHANGES = {
    "plain": {},
    "by_token": {"calibration": {"method": "adaptive_temperature"}},
    "graded": {"task": {"kind": "custom", "grader": "graders_of_team:is_right"}},
    "parts": {"training": {"zero_stage": 3}},
}

GRADER = """import os


def is_right(answer, question):
    if os.environ["RANK"] != "0":
        raise ValueError("no grade here")
    return False
"""


def write_run(folder, changes):
    output = finished_run(folder, SPLITS, 4)
    config = yaml.safe_load((output / "config.yaml").read_text())
    config["evaluation"]["batch_size"] = 4
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process makes of each run, and two."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import calibrate, evaluate

    folder = tmp_path_factory.mktemp("team")
    two = folder / "two"
    for name, changes in CHANGES.items():
        write_run(two / name, changes)
    (two / "graders_of_team.py").write_text(GRADER)
    shutil.copytree(two, one := folder / "one")
    ended = run(forked(2, str(__file__).replace("test_team", "team_cases"), str(two)), folder)
    assert ended.code == 0, ended.output[-6000:]
    for name in ("plain", "by_token"):
        calibrate.run(one / name / "run")
    config = load_config(one / "parts" / "run" / "config.yaml")
    evaluate.run(
        config, model=one / "parts" / "run" / "model", split="test", output=one / "parts" / "run" / "test.jsonl"
    )
    config = load_config(one / "plain" / "run" / "config.yaml")
    evaluate.run(config, model=None, split="test", output=one / "start.jsonl")
    return one, two


@pytest.mark.parametrize("name", ["plain", "by_token"])
def test_a_calibration_by_two_processes_is_bit_for_bit_that_of_one(folders, name):
    one, two = (folder / name / "run" for folder in folders)
    for split in ("temperature", "certification"):
        assert (one / "answers" / f"{split}.jsonl").read_bytes() == (two / "answers" / f"{split}.jsonl").read_bytes()
    found = [json.loads((folder / "calibration.json").read_text()) for folder in (one, two)]
    assert found[0] == found[1]


def test_the_starting_model_with_its_examples_answers_alike(folders):
    one, two = ((folder / "start.jsonl").read_bytes() for folder in folders)
    assert one == two
    assert one.count(b"\n") == SPLITS["test"]


def test_a_model_in_parts_answers_as_the_whole_one(folders):
    lines = [(folder / "parts" / "run" / "test.jsonl").read_text().splitlines() for folder in folders]
    one, two = ([json.loads(line) for line in some] for some in lines)
    assert [line["text"] for line in one] == [line["text"] for line in two]
    tables = [np.array([line["logprobs_at"] for line in some]) for some in (one, two)]
    np.testing.assert_allclose(*tables, atol=1e-4)
    told = json.loads((folders[1] / "told.json").read_text())
    assert "--engine" in told["whole"]


def test_what_another_process_cannot_grade_is_told_once_all_answers_are_written(folders):
    _, two = folders
    lines = [json.loads(line) for line in (two / "graded" / "run" / "test.jsonl").read_text().splitlines()]
    grades = [line["correct"] for line in lines]
    assert len(grades) == SPLITS["test"]
    missing = grades.count(None)
    assert 0 < missing < len(grades)
    told = json.loads((two / "told.json").read_text())["graded"]
    assert f"graders_of_team:is_right: {missing} of {len(grades)} answers have no grade" in told
    assert "no grade here" in told


@pytest.mark.slow
def test_the_command_starts_its_processes_itself_and_gives_rank_0s_exit_code(folders, tmp_path):
    shutil.copytree(folders[0] / "plain", tmp_path / "plain")
    output = tmp_path / "plain" / "run"
    shutil.rmtree(output / "answers")
    command = [sys.executable, "-m", "calibtrain.cli", "calibrate", str(output), "--num-processes", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert ended.returncode == 1, ended.stderr  # nothing can be certified by so few
    assert ended.stdout.count("temperature") <= 3  # told once
    for split in ("temperature", "certification"):
        expected = (folders[0] / "plain" / "run" / "answers" / f"{split}.jsonl").read_bytes()
        assert (output / "answers" / f"{split}.jsonl").read_bytes() == expected
    (output / "model" / "config.json").write_text("{}")
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("model.source") == 1


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(folders, tmp_path):
    import psutil

    shutil.copytree(folders[0] / "plain", tmp_path / "plain")
    command = [
        sys.executable,
        "-m",
        "calibtrain.cli",
        "calibrate",
        str(tmp_path / "plain" / "run"),
        "--num-processes",
        "2",
    ]
    with subprocess.Popen(command, env=environment()) as process:
        ranks = {}
        while "1" not in ranks:
            assert process.poll() is None
            time.sleep(0.1)
            children = psutil.Process(process.pid).children()
            ranks = {one.environ().get("RANK"): one for one in children}
        ranks["1"].kill()
        assert process.wait(60) == 1
        assert not any(one.is_running() and one.status() != "zombie" for one in ranks.values())

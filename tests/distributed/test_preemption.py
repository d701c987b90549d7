"""A run that is asked to stop (SIGTERM) ends in order, with a checkpoint; the same command goes on, bit for bit."""

import gzip
import json
import os
import signal
import sys

import pytest
from safetensors.torch import load_file

from tests.distributed.jobs import metrics, trained, write_job
from tests.distributed.ranks import run
from tests.distributed.test_failures import ranks_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CLI = (sys.executable, "-m", "calibtrain.cli")
STEPS = 20
TRAINING = {"max_steps": STEPS, "checkpoint_every": None, "learning_rate": 1e-4}


def asked_to_stop(folder, name, ranks, whom, *more):
    """The job once it has logged three steps and `whom` (a function of the command's pid) got SIGTERM."""
    config, told = write_job(folder, name, training=TRAINING), []

    def watch(pid):
        log = folder / name / "metrics.jsonl"
        if not told and log.is_file() and log.read_text().count("\n") >= 3:
            told.append(whom(pid))
            os.kill(told[0], signal.SIGTERM)
        return False

    return config, run([*CLI, "train", str(config), "--num-processes", str(ranks), *more], folder, 200, watch=watch)


@pytest.mark.parametrize(
    ("ranks", "whom", "goes_on"),
    [
        pytest.param(1, lambda pid: pid, False, marks=pytest.mark.slow),  # one rank of two goes the same way
        (2, lambda pid: pid, False),
        (2, lambda pid: ranks_of(pid)[1], True),
    ],
    ids=["one process", "the launcher of two", "one rank of two"],
)
def test_a_stopped_run_ends_in_order_and_goes_on_bit_for_bit(tmp_path, ranks, whom, goes_on):
    traced = [] if goes_on else [f"training.profile_steps={STEPS}"]  # still going on when it is stopped
    config, ended = asked_to_stop(tmp_path, "stopped", ranks, whom, *traced)
    assert ended.code == 75, ended.output[-3000:]
    assert "stopped as asked (SIGTERM) after step" in ended.output
    assert "Traceback" not in ended.output
    (kept,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    step = json.loads((kept / "run.json").read_text())["step"]
    assert 3 <= step < STEPS
    assert not (tmp_path / "stopped" / "model").exists()
    for rank in range(ranks) if traced else ():
        trace = json.loads(gzip.decompress((tmp_path / "stopped" / "profile" / f"rank{rank}.json.gz").read_bytes()))
        assert any("AdamW" in event.get("name", "") for event in trace["traceEvents"])
    if not goes_on:  # what the ranks did is the same whoever was told
        return
    whole = write_job(tmp_path, "whole", training=TRAINING)
    ended = run([*trained(ranks, config, whole), "training.resume=auto"], tmp_path, 200)
    assert ended.code == 0, ended.output[-3000:]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(expected[name].equal(found[name]) for name in expected)

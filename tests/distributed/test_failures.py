"""What ends a job: a dead rank, a user's mistake. And what does not: a W&B server that cannot be reached."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import TRAIN, metrics, train, write_job
from tests.distributed.ranks import descendants, environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CLI = (sys.executable, "-m", "calibtrain.cli")


def ranks_of(pid):
    """Training processes below a launcher, by rank."""
    found = {}
    for one in descendants(pid):
        try:
            command = Path(f"/proc/{one}/cmdline").read_bytes()
            variables = dict(
                entry.partition(b"=")[::2] for entry in Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
            )
        except OSError:
            continue
        if b"calibtrain.launchers.train" in command and b"RANK" in variables and b"runner" not in command:
            found[int(variables[b"RANK"])] = one
    return found


def test_a_dead_rank_ends_the_job_within_a_minute_with_its_cause(tmp_path):
    config = write_job(tmp_path, training={"max_steps": 100_000, "checkpoint_every": None})
    killed_at, seen = [], []

    def kill_rank_1(pid):
        logged = (tmp_path / "run" / "metrics.jsonl").is_file() and metrics(tmp_path / "run")
        if logged and not killed_at:
            ranks = ranks_of(pid)
            seen.extend(descendants(pid))
            os.kill(ranks[1], signal.SIGKILL)
            killed_at.append(time.monotonic())
        return bool(killed_at) and time.monotonic() - killed_at[0] > 60

    ended = run([*CLI, "train", str(config), "--num-processes", "2"], tmp_path, watch=kill_rank_1)
    assert killed_at, ended.output[-3000:]
    assert ended.code not in (0, -signal.SIGKILL), "the job was still running a minute later"
    assert "return code = -9" in ended.output, ended.output[-3000:]
    assert "rank0: " in ended.output  # what the surviving rank met
    assert len(seen) >= 2
    alive = [pid for pid in seen if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]
    assert alive == []


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow  # tests/unit/hooks shows the same in seconds, without the training
def test_an_unreachable_wandb_neither_stops_nor_slows_training(tmp_path):
    steps = {"max_steps": 4, "checkpoint_every": None}
    config = write_job(tmp_path, training=steps, tracking={"wandb": True, "mode": "online"})
    env = environment(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    ended = run([sys.executable, *TRAIN, str(config)], tmp_path, env=env)
    assert ended.code == 0, ended.output[-3000:]
    assert "not reachable" in ended.output
    assert "a" * 40 not in ended.output
    lines = [line for line in metrics(tmp_path / "run") if line["event"] == "log"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    # The server is given half a minute to answer; training was over long before.
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime + 20 > (tmp_path / "run" / "model").stat().st_mtime


def test_a_users_mistake_on_two_ranks_is_said_once_with_exit_code_2(tmp_path):
    config = write_job(tmp_path)
    ended = run([*CLI, "train", str(config), "training.global_batch_size=3", "--num-processes", "2"], tmp_path)
    assert ended.code == 2, ended.output[-3000:]
    assert ended.output.count("cannot be cut into micro-batches") == 1
    assert not (tmp_path / "run").exists()
    ended = run([*CLI, "train", str(config), "data.splits.train=100000", "--num-processes", "2"], tmp_path)
    assert ended.code == 2, ended.output[-3000:]
    assert ended.output.count("100000 asked for") == 1
    assert "shm_comm" not in ended.output  # what DeepSpeed compiles when a rank joins the others
    assert not (tmp_path / "run").exists()
    ended = run(train(2, config, "data.splits.train=100000"), tmp_path)
    assert "shm_comm" not in ended.output
    assert "exitcode  : 2" in ended.output
    assert ended.output.count("100000 asked for") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

"""One run on two hosts, by pdsh and by Slurm's variables: homes apart, output_dir shared, or not shared and told at once."""

import json
import os
import sys
import time

import pytest

from tests.distributed.hosts import ADDRESSES, obstacle, two_hosts
from tests.distributed.jobs import metrics, train, write_job
from tests.distributed.ranks import ROOT, environment, run

WHY_NOT = obstacle() if os.environ.get("CALIBTRAIN_TWO_HOSTS", "1") == "1" else "not asked for"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(1000),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]

ROWS, SECONDS = 2200, 420


def job(folder, name, **training):
    """More records than are encoded anew by each rank, so that they are kept on disk."""
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "completion": f"{i % 10}"}) + "\n" for i in range(ROWS))
    )
    none = {"train": None, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}
    data = {"source": {"kind": "file", "path": str(folder / "rows.jsonl")}, "splits": none}
    settings = {"zero_stage": 2, "max_steps": 3, "checkpoint_every": 2, **training}
    return write_job(folder, name, data=data, training=settings, penalties=[])


def launched(how, hosts, config, folder, *overrides):
    """The command line of a job on both hosts."""
    if how == "slurm":
        return ["bash", str(ROOT / "launchers" / "slurm.sbatch"), str(config), *overrides]
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    module = [sys.executable, "-m", "calibtrain.launchers.multinode"]
    return hosts.on(0, [*module, str(hostfile), str(config), *overrides])


@pytest.mark.parametrize("how", ["pdsh", "slurm"])
def test_a_run_on_two_hosts_is_that_of_one(tmp_path, how):
    alone = job(tmp_path, "alone")
    ended = run(train(2, alone), tmp_path, SECONDS)
    assert ended.code == 0, ended.output[-4000:]
    both = job(tmp_path, "both")
    with two_hosts(tmp_path / "hosts") as hosts:
        ended = run(launched(how, hosts, both, tmp_path), tmp_path, SECONDS, hosts.environment(environment()))
        assert ended.code == 0, ended.output[-4000:]
        kept = [list(hosts.home(n).glob(".cache/calibtrain/tokens/*/meta.json")) for n in (0, 1)]
    assert [len(one) for one in kept] == [1, 1]  # one rank of each home encoded
    assert kept[0][0].parent.name == kept[1][0].parent.name
    assert kept[0][0].with_name("ids.bin").read_bytes() == kept[1][0].with_name("ids.bin").read_bytes()
    assert metrics(tmp_path / "both") == metrics(tmp_path / "alone")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("alone", "both")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("how", ["pdsh", "slurm"])
def test_an_output_dir_that_is_not_shared_is_told_at_once(tmp_path, how):
    config = job(tmp_path, "apart")
    with two_hosts(tmp_path / "hosts", own_disk=tmp_path / "apart") as hosts:
        started = time.monotonic()
        ended = run(launched(how, hosts, config, tmp_path), tmp_path, SECONDS, hosts.environment(environment()))
    assert ended.code == 2, ended.output[-4000:]
    assert time.monotonic() - started < SECONDS - 60
    told = (
        "is not seen by every machine"
        if how == "pdsh"
        else "is not one directory for all processes: rank(s) 1 do not see"
    )
    assert told in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "apart" / "model").exists()

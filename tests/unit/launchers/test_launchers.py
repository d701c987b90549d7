"""The argv of each launcher, seen by fakes on the PATH, and how exit codes and causes come back."""

import json
import os
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibtrain.cli_checks import on_processes
from calibtrain.errors import UserError
from calibtrain.launchers import environment, errors, local, multinode, team, train

ROOT = Path(__file__).parents[3]


def fake(directory, name, body):
    directory.mkdir(exist_ok=True)
    file = directory / name
    file.write_text(f"#!{sys.executable}\n{body}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def seen(file, code=0):
    return (
        f"import json, os, sys\njson.dump([sys.argv, dict(os.environ)], open({str(file)!r}, 'w'))\nsys.exit({code})\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--local_rank=1", "demo", "a.b=1"], (None, "demo", ["a.b=1"])),
        (["--local-rank", "1", "demo"], (None, "demo", [])),
        (["--env-file=e.json", "c.yaml"], (Path("e.json"), "c.yaml", [])),
    ],
)
def test_train_accepts_what_launchers_insert(arguments, expected):
    assert train.parse(arguments) == expected


@pytest.mark.parametrize("arguments", [[], ["--nonsense", "demo"]])
def test_train_refuses_what_it_does_not_know(arguments):
    with pytest.raises(UserError, match="usage"):
        train.parse(arguments)


def test_local_argv():
    argv = local.local_argv("my config.yaml", ["a.b=[1, 2]"], num_processes=2, port=12345)
    assert argv[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert argv[argv.index("--num_accelerators") + 1] == "2"
    assert argv[-3:] == ["calibtrain.launchers.train", "my config.yaml", "a.b=[1, 2]"]
    named = local.local_argv("c", num_processes=2, port=1, visible_devices="4,6,7")
    assert named[named.index("--include") + 1] == "localhost:4,6"
    assert "--num_accelerators" not in named
    alone = local.local_argv("my config.yaml", ["a=1"], num_processes=1, port=1)
    assert alone[-4:] == ["-m", "calibtrain.launchers.train", "my config.yaml", "a=1"]


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(2)", 2), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)]
)
def test_exit_codes_come_through(code, expected):
    assert local.run([sys.executable, "-c", f"import os, sys; {code}"], os.environ) == expected


def test_a_killed_rank_is_explained(tmp_path):
    assert "memory" in local.explain(247, tmp_path)
    assert "memory" in local.explain(137, tmp_path)
    assert "signal 11" in local.explain(245, tmp_path)


def test_causes_are_kept_by_rank_and_told_once(tmp_path, capsys):
    assert errors.report_error(UserError("row 3 has no answer"), tmp_path, 0) == 2
    assert errors.report_error(UserError("row 3 has no answer"), tmp_path, 1) == 2
    assert errors.report_error(ValueError("boom"), tmp_path, 2) == 1
    told = capsys.readouterr().err
    assert told.count("row 3 has no answer") == 1
    assert "[rank 2]" in told
    assert "ValueError: boom" in (tmp_path / "errors" / "rank2.txt").read_text()
    summary = errors.error_summary(tmp_path)
    assert "rank0, rank1: row 3 has no answer" in summary
    assert "rank2: ValueError: boom" in summary
    errors.clear_errors(tmp_path)
    assert errors.error_summary(tmp_path) == ""


def test_a_process_that_hangs_at_exit_is_ended():
    code = (
        "import atexit, sys, time\nfrom calibtrain.launchers.errors import end_within\n"
        "atexit.register(time.sleep, 60)\nend_within(0.2, 3)\nsys.exit(1)\n"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 3
    assert time.monotonic() - started < 45


def test_a_process_ends_behind_its_exit_handlers_with_its_own_code():
    code = (
        "from calibtrain.launchers.errors import end_without_teardown\nnote = end_without_teardown()\n"
        "import atexit, sys\natexit.register(print, 'a handler')\n"
        "class Loud:\n    def __del__(self): print('taken apart')\nloud = Loud()\nsys.exit(note(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 3
    assert done.stdout == "a handler\n"


def test_the_environment_travels_by_a_private_file(tmp_path):
    given = {"WANDB_API_KEY": "k", "HF_HOME": "/h", "CALIBTRAIN_CACHE": "/c", "PATH": "/bin", "AWS_SECRET": "s"}
    file = environment.write_environment_file(tmp_path / "launch" / "environment.json", given)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    target = {"HF_HOME": "/mine"}
    environment.read_environment_file(file, target)
    assert target == {"WANDB_API_KEY": "k", "HF_HOME": "/mine", "CALIBTRAIN_CACHE": "/c"}
    with pytest.raises(UserError, match="shares"):
        environment.read_environment_file(tmp_path / "none", {})


def test_slurm_ranks(tmp_path, monkeypatch):
    fake(
        tmp_path / "bin",
        "scontrol",
        "import sys\nassert sys.argv[1:] == ['show', 'hostnames', 'n[1-2]']\nprint('n1\\nn2')\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    slurm = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
    environment.adopt_slurm_ranks(slurm)
    assert [slurm[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == ["9", "16", "1", "n1"]
    torchrun = {"RANK": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}
    environment.adopt_slurm_ranks(torchrun)
    assert torchrun["RANK"] == "0"


@pytest.mark.parametrize("code", [0, 5, 75])
def test_sbatch_runs_srun_with_the_environment(tmp_path, code):
    fake(tmp_path / "bin", "srun", seen(tmp_path / "seen.json", code))
    fake(tmp_path / "bin", "scontrol", seen(tmp_path / "requeued.json", 0))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(
        ["bash", str(ROOT / "launchers" / "slurm.sbatch"), "demo", "a.b=[1, 2]"],
        env={**os.environ, **slurm, "PATH": path, "WANDB_API_KEY": "secret"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    argv, given = json.loads((tmp_path / "seen.json").read_text())
    assert "--export=ALL" in argv
    assert "--kill-on-bad-exit=1" in argv
    assert "--cpus-per-task=12" in argv
    assert argv[-5:] == ["-m", "calibtrain.launchers.train", "demo", "training.resume=auto", "a.b=[1, 2]"]
    assert given["WANDB_API_KEY"] == "secret"
    assert "secret" not in " ".join(argv)
    requeued = tmp_path / "requeued.json"
    assert requeued.exists() == (code == 75)
    if code == 75:
        assert json.loads(requeued.read_text())[0][-2:] == ["requeue", "17"]


def test_the_job_is_given_time_to_end():
    lines = (ROOT / "launchers" / "slurm.sbatch").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@300"} <= set(lines)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_multinode_reaches_pdsh_without_keys_on_the_command_line(tmp_path, code):
    out = tmp_path / "out"
    keep = f"import shutil; shutil.copy({str(out / 'launch' / 'environment.json')!r}, {str(tmp_path / 'env.json')!r})\n"
    looks = (
        f"import sys\nif sys.argv[-1] == 'test -r {out}/launch/environment.json': sys.exit({1 if code == 2 else 0})\n"
    )
    fake(tmp_path / "bin", "pdsh", looks + keep + seen(tmp_path / "seen.json", code))
    fake(tmp_path / "bin", "ssh", "print('10.0.0.1')\n")
    hosts = tmp_path / "hosts"
    hosts.write_text((ROOT / "launchers" / "hostfile.example").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "calibtrain.launchers.multinode", str(hosts), "demo", f"output_dir={out}", "name=a b;c",
         "training.micro_batch_size=4", "training.global_batch_size=64"],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "WANDB_API_KEY": "secret"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert not (out / "launch" / "environment.json").exists()
    if code == 2:  # a machine that does not see what lies in output_dir: nothing is launched
        assert f"output_dir: {out} is not seen by every machine" in done.stderr
        assert not (tmp_path / "seen.json").exists()
        return
    argv, _ = json.loads((tmp_path / "seen.json").read_text())
    words = " ".join(argv)
    assert argv[argv.index("-w") + 1] == "node-1,node-2"
    assert "calibtrain.launchers.train" in words
    assert str(out / "launch" / "config.yaml") in words
    assert "secret" not in words + done.stdout + done.stderr
    assert "a b;c" not in words
    assert "a b;c" in (out / "launch" / "config.yaml").read_text()
    assert json.loads((tmp_path / "env.json").read_text())["WANDB_API_KEY"] == "secret"


def test_multinode_looks_before_it_launches(tmp_path, capsys):
    hosts = tmp_path / "hosts"
    hosts.write_text((ROOT / "launchers" / "hostfile.example").read_text())
    assert multinode.slots_of(hosts) == 16
    fake(tmp_path / "bin", "pdsh", "raise SystemExit('launched')\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        assert multinode.main([str(hosts), "demo", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "on 16 process(es)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for text in ("", "node-1 8\n", "node-1 slots=many\n"):
        hosts.write_text(text)
        with pytest.raises(UserError, match="slots=8"):
            multinode.slots_of(hosts)


def test_multinode_ends_everywhere_when_one_rank_has_failed(tmp_path):
    errors.report_error(ValueError("boom"), tmp_path, 3)
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert multinode.watch(launcher, tmp_path, grace=0.2) == 1
    assert launcher.poll() is not None


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_job_with_its_cause(tmp_path, monkeypatch):
    """Under the real deepspeed launcher: one rank raises or is killed while the other waits for ever."""
    module = tmp_path / "dying.py"
    module.write_text(
        "import os, pathlib, sys, time\nfrom calibtrain.launchers.errors import report_error\n"
        "if os.environ['RANK'] == '1':\n"
        "    if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
        "    sys.exit(report_error(ValueError('boom'), pathlib.Path(sys.argv[2]), 1))\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(local, "TRAIN_MODULE", "dying")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for how, words in (("raises", "rank1: ValueError: boom"), ("killed", "signal 9")):
        out = tmp_path / how
        code = local.launch(how, [str(out)], num_processes=2, output_dir=out)
        assert code not in (0, None)
        assert words in local.explain(code, out)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["calibrate", "--bogus"], 2, "--bogus"),
        (["calibrate", "--help"], 0, ""),
        (["evaluate", "none.yaml"], 2, "none.yaml"),
        (["confidence", "out"], 2, "confidence asks in one process: start `calibtrain confidence` without torchrun"),
    ],
)
def test_a_team_tells_a_users_mistake_as_the_command_would(monkeypatch, capsys, arguments, code, told):
    monkeypatch.setenv(team.MEMBER, "1")
    monkeypatch.setattr(team, "end_within", lambda seconds, code: None)
    main = SimpleNamespace(world=SimpleNamespace(is_main=True))
    monkeypatch.setattr("calibtrain.pipeline.team.joined", lambda: nullcontext(main))
    assert team.main(arguments) == code
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_what_is_asked_in_one_process_is_refused_in_a_team(monkeypatch):
    on_processes(None, alone="--source")
    with pytest.raises(UserError, match="--num-processes: --source asks in one process"):
        on_processes(2, alone="--source")
    monkeypatch.setenv(team.MEMBER, "1")
    on_processes(None)
    with pytest.raises(UserError, match="several processes: --source asks in one process"):
        on_processes(None, alone="--source")


def test_a_terminated_team_leaves_no_process_behind(tmp_path):
    member = "import os, time; open('pid' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"from calibtrain.launchers import team; team.MODULE = 'timeit'; team.launch(['-n1', '-r1', {member!r}], 2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as process:
        files = [tmp_path / f"pid{rank}" for rank in (0, 1)]
        while not all(file.is_file() and file.read_text() for file in files):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 143
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)

"""Start a job on the machines of a hostfile: `python -m calibtrain.launchers.multinode HOSTFILE CONFIG [a.b=c ...]`.

The deepspeed launcher reaches the machines by pdsh and ssh. output_dir must be on a disk that all of them share.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from calibtrain.launchers.environment import write_environment_file
from calibtrain.launchers.errors import clear_errors, error_directory
from calibtrain.launchers.local import TRAIN_MODULE, explain, free_port

USAGE = "usage: python -m calibtrain.launchers.multinode HOSTFILE CONFIG [a.b=c ...]"
SECONDS_AFTER_FIRST_ERROR = 20.0
"""When a rank has failed, the others get this long to say why they failed, too; then the job is ended everywhere."""


def multinode_argv(hostfile: Path, config: Path, environment_file: Path, *, port: int) -> list[str]:
    """Command line of the deepspeed launcher. Overrides are in the config: pdsh hands the words to remote shells."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--hostfile", str(hostfile), "--launcher", "pdsh", f"--master_port={port}", "--no_local_rank",
        "--module", TRAIN_MODULE, f"--env-file={environment_file}", str(config),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch, watch and end the job; returns its exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if len(arguments) < 2 or arguments[0].startswith("-"):
            raise UserError(USAGE)
        hostfile = Path(arguments[0])
        if not hostfile.is_file():
            raise UserError(f"{hostfile}: no such hostfile; each line is `machine slots=8`, see hostfile.example")
        if shutil.which("pdsh") is None:
            raise UserError("pdsh is not installed here: install it, or use Slurm (launchers/slurm.sbatch)")
        config = load_config(arguments[1], arguments[2:])
        from calibtrain.pipeline.check import check

        check(config, slots_of(hostfile))  # a mistake is told here, once
        return _launch(hostfile.resolve(), config.model_copy(update={"output_dir": config.output_dir.resolve()}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def slots_of(hostfile: Path) -> int:
    """Processes of all machines of a hostfile."""
    total = 0
    for words in _entries(hostfile):
        name, _, slots = words[-1].partition("=")
        if len(words) != 2 or name != "slots" or not slots.isdecimal():
            raise UserError(f"{hostfile}: {' '.join(words)!r}: each line is `machine slots=8`, see hostfile.example")
        total += int(slots)
    if not total:
        raise UserError(f"{hostfile}: names no machine; each line is `machine slots=8`, see hostfile.example")
    return total


def _entries(hostfile: Path) -> list[list[str]]:
    """The words of each line that is no comment."""
    lines = [line.partition("#")[0].split() for line in hostfile.read_text("utf-8").splitlines()]
    return [words for words in lines if words]


def check_every_machine_sees(file: Path, hostfile: Path) -> None:
    """Raise UserError unless every machine sees a file that lies in output_dir here; else they would wait for each other."""
    hosts = ",".join(words[0] for words in _entries(hostfile))
    argv = ["pdsh", "-S", "-w", hosts, f"test -r {shlex.quote(str(file))}"]
    done = subprocess.run(argv, env={**os.environ, "PDSH_RCMD_TYPE": "ssh"}, capture_output=True, text=True)
    if done.returncode:
        told = "; ".join(line for line in done.stderr.splitlines() if line.strip())[:500]
        raise UserError(
            f"output_dir: {file.parents[1]} is not seen by every machine of {hostfile}: give a path on a disk that all of "
            f"them mount ({told or f'pdsh ended with {done.returncode}'})"
        )


def _launch(hostfile: Path, config: RunConfig) -> int:
    launch_directory = config.output_dir / "launch"
    clear_errors(config.output_dir)
    dump_config(config, launch_directory / "config.yaml")
    environment_file = write_environment_file(launch_directory / "environment.json", os.environ)
    argv = multinode_argv(hostfile, launch_directory / "config.yaml", environment_file, port=free_port())
    try:
        check_every_machine_sees(environment_file, hostfile)
        code = watch(subprocess.Popen(argv), config.output_dir)
    finally:
        environment_file.unlink(missing_ok=True)
    if code:
        print(explain(code, config.output_dir), file=sys.stderr)
    return code


def watch(launcher: subprocess.Popen[bytes], output_dir: Path, grace: float = SECONDS_AFTER_FIRST_ERROR) -> int:
    """Wait for the launcher; a machine whose rank failed does not leave the others waiting for it. Returns the code."""
    previous = {
        number: signal.signal(number, lambda number, _frame: launcher.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    ended_by_us = False
    try:
        while launcher.poll() is None:
            time.sleep(min(1.0, grace))
            if not ended_by_us and any(error_directory(output_dir).glob("rank*.txt")):
                try:
                    launcher.wait(timeout=grace)
                except subprocess.TimeoutExpired:
                    launcher.terminate()  # deepspeed ends the processes on every machine by pdsh
                    ended_by_us = True
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = launcher.returncode
    if ended_by_us:
        return _code_of_first(output_dir)
    return code if code >= 0 else 128 - code


def _code_of_first(output_dir: Path) -> int:
    first = min(error_directory(output_dir).glob("rank*.txt"), key=lambda file: file.stat().st_mtime)
    return int(first.read_text("utf-8").split("\n", 1)[0].removeprefix("exit code "))


if __name__ == "__main__":
    sys.exit(main())

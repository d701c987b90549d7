"""One of several processes that answer for a command: `python -m calibtrain.launchers.team evaluate CONFIG ...`.

Rank 0 runs the command, as `calibtrain` would, and the others answer their shares of its questions. `calibtrain evaluate
--num-processes N` starts them on this machine; torchrun and srun may start them on several.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from calibtrain.errors import UserError, told
from calibtrain.launchers.environment import adopt_slurm_ranks
from calibtrain.launchers.errors import END_GRACE_SECONDS, end_within
from calibtrain.launchers.local import free_port, gpu_count, local_environment

MODULE = "calibtrain.launchers.team"
MEMBER = "CALIBTRAIN_TEAM"
"""Set in the processes of a team, so that the command which they run starts no others."""
DIVIDED = ("evaluate", "calibrate")
"""Commands that divide their questions; the others would wait for a word that rank 0 does not give."""
LOOK_SECONDS = 0.2
CLOSE_SECONDS = 20.0
"""How long the others may take to end once rank 0 has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as one of the team and return the exit code: that of the command, 2 for a user's mistake, 1 for anything else."""
    adopt_slurm_ranks(os.environ)
    os.environ[MEMBER] = "1"
    given = list(sys.argv[1:] if arguments is None else arguments)
    from calibtrain.pipeline.team import joined

    code = 0
    try:
        if given[:1] and given[0] not in DIVIDED:
            raise UserError(f"{given[0]} asks in one process: start `calibtrain {given[0]}` without torchrun")
        with joined() as team:
            if not team.world.is_main:
                team.work()
                return 0
            from calibtrain.cli import app

            try:
                app(given)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except UserError as error:
        print(told(str(error)), file=sys.stderr)
        code = 2
    if code:
        end_within(END_GRACE_SECONDS, code)
    return code


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run a command on `num_processes` processes of this machine; returns rank 0's exit code.

    Where another of them dies first (killed for memory, say), all are ended, and it is 1. So they are by SIGTERM.
    """
    shared = local_environment(os.environ, num_processes=num_processes, gpus=gpu_count())
    shared |= {
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        MEMBER: "1",
    }
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # not to leave them behind
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen([sys.executable, "-m", MODULE, *arguments], env=own))
        while started[0].poll() is None:
            died = next((one for one in started[1:] if one.poll()), None)
            if died is not None:
                try:  # what it told rank 0 is rank 0's to tell
                    return started[0].wait(CLOSE_SECONDS) or 1
                except subprocess.TimeoutExpired:
                    print(f"A process that answered ended with exit code {died.returncode}.", file=sys.stderr)
                    return 1
            time.sleep(LOOK_SECONDS)
        deadline = time.monotonic() + CLOSE_SECONDS
        for one in started[1:]:
            try:
                one.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.kill()
        return started[0].returncode
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
                one.wait()
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())

"""One training process: `python -m calibtrain.launchers.train CONFIG [a.b=c ...]`, alone or under any launcher.

Under `deepspeed --module`, `torchrun --module` and `srun` the launcher tells each process its rank by the environment.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.launchers.environment import adopt_slurm_ranks, read_environment_file
from calibtrain.launchers.errors import (
    END_GRACE_SECONDS,
    clear_errors,
    end_within,
    end_without_teardown,
    report_error,
)

USAGE = "usage: python -m calibtrain.launchers.train [--env-file FILE] CONFIG [a.b=c ...]"

LINGER_SECONDS = 2.5
"""A rank that fails waits so long before it ends. Often a peer was killed, and the launcher, which looks once a second and
names the first dead process that it sees, must see that one."""


def parse(arguments: Sequence[str]) -> tuple[Path | None, str, list[str]]:
    """Environment file, config and overrides. The deepspeed launcher's --local_rank=N is accepted and not needed."""
    environment_file: Path | None = None
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            if not equals:
                next(remaining, None)
        elif name == "--env-file":
            environment_file = Path(value if equals else next(remaining, ""))
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}\n{USAGE}")
        else:
            rest.append(argument)
    if not rest:
        raise UserError(f"no config given\n{USAGE}")
    return environment_file, rest[0], rest[1:]


def main(arguments: Sequence[str] | None = None, environment: MutableMapping[str, str] = os.environ) -> int:
    """Train as one rank and return the exit code: 0, 2 for a user's mistake, 75 when asked to stop, 1 for anything else."""
    output_dir: Path | None = None
    adopt_slurm_ranks(environment)
    rank = int(environment.get("RANK", 0))
    try:
        environment_file, config_path, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        if environment_file is not None:
            read_environment_file(environment_file, environment)
        config = load_config(config_path, overrides)
        output_dir = config.output_dir
        clear_errors(output_dir, rank)
        from calibtrain.pipeline.train import run

        run(config)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            return 0
        code = report_error(error, output_dir, rank)
        if code == 1 and int(environment.get("WORLD_SIZE", 1)) > 1:
            time.sleep(LINGER_SECONDS)
        end_within(END_GRACE_SECONDS, code)
        return code
    return 0


if __name__ == "__main__":
    note_code = end_without_teardown()
    sys.exit(note_code(main()))

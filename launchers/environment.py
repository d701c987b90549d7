"""What the processes of a job on several machines must know: secrets and settings by file, ranks by variables."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from calibtrain.errors import UserError

EXPORTED = ("WANDB_", "HF_", "CALIBTRAIN_")
"""Variables with these beginnings reach every process of a job, on every machine."""


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that each machine needs."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(EXPORTED)}


def write_environment_file(path: Path, environment: Mapping[str, str]) -> Path:
    """Write the exported variables for the other machines, readable by the owner alone.

    On a command line (pdsh, .deepspeed_env) every user of the machines could read the keys, and logs would keep them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(exported(environment), file)
    return path


def read_environment_file(path: Path, environment: MutableMapping[str, str]) -> None:
    """Set the variables of a file that `write_environment_file` made; those already set on this machine stay."""
    try:
        values = json.loads(path.read_text("utf-8"))
        pairs = [(str(name), str(value)) for name, value in values.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--env-file {path}: cannot be read: {error}; output_dir must be on a disk that every machine shares"
        ) from None
    for name, value in pairs:
        if name.startswith(EXPORTED):
            environment.setdefault(name, value)


def adopt_slurm_ranks(environment: MutableMapping[str, str]) -> None:
    """Under `srun`, one task a process, set the variables that torch.distributed reads from Slurm's own."""
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    if int(environment["SLURM_STEP_NUM_TASKS"]) == 1:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    # Jobs that share a machine get ports of their own.
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000))


def _first_host(nodes: str) -> str:
    """First machine of Slurm's compressed list, by Slurm's own command."""
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol could not expand the node list {nodes!r}: {error}; set MASTER_ADDR") from None
    return listed.stdout.split()[0]

"""`calibtrain plan`: memory and time of a run on GPUs that need not be here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from calibtrain.cli_options import Config, Overrides
from calibtrain.errors import UserError


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="GPUs of a node and GiB of each, e.g. 8x80.")] = "8x80",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    link: Annotated[str, typer.Option(help="Between the GPUs of a node: nvlink, pcie or ib.")] = "nvlink",
    device: Annotated[
        str, typer.Option(help="What GPUs, for the time of a step: h100, a100, h200, b200, l40s, ...")
    ] = "h100",
    host_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of a node's memory. Default: as much as it takes.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Plan a run on GPUs: memory of each phase, time of a step, and the settings that fit.

    The model's config.json is enough; no weights are read. Exit code 1 where nothing fits.
    """
    from calibtrain.config_file import load_config
    from calibtrain.models.cost import DEVICES
    from calibtrain.pipeline.plan import make_plan, show
    from calibtrain.pipeline.plan_time import LINKS, Cluster

    found = re.fullmatch(r"([1-9]\d{0,3})x(\d{1,4}(?:\.\d+)?)", gpus)
    if found is None or not float(found[2]):
        raise UserError(f"--gpus: {gpus!r} is not GPUs x GiB, e.g. 8x80")
    for name, value, known in (("--link", link, LINKS), ("--device", device, DEVICES)):
        if value not in known:
            raise UserError(f"{name}: {value!r} is none of {', '.join(known)}")
    cluster = Cluster(int(found[1]), float(found[2]), nodes, link, DEVICES[device])
    planned = make_plan(load_config(config, overrides or []), cluster, host_memory)
    show(planned)
    if json_path is not None:
        import json

        try:
            json_path.write_text(json.dumps(planned.as_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_path}: cannot be written: {error.strerror}") from None
    if planned.best is None:
        raise typer.Exit(1)

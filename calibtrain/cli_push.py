"""`calibtrain push`: a finished run onto the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from calibtrain.cli_checks import trained
from calibtrain.cli_options import OutputDir


def push(
    output_dir: OutputDir,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it one that you alone see.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, without calibration.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where there is none. Default: main.")] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also questions and answers: in the report, and as files.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, print the card, and send nothing.")
    ] = False,
) -> None:
    """Push the exported model with its calibration, its report and a model card to the Hugging Face hub.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from calibtrain.pipeline.push import collect, run

    found = collect(trained(output_dir), repo, adapter=adapter, answers=answers)
    if dry_run:
        typer.echo("\n".join([*found.lines(), "", found.card]))
        return
    typer.echo(run(found, repo, private=private, revision=revision))

"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config: demo, sft, orpo, ...")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the config, e.g. training.epochs=2 penalties.0.weight=0.5")
]
Source = Annotated[
    str | None,
    typer.Option(
        help="Of the confidence: likelihood, head, or what `calibrate --source` calibrated. Default: as `calibrate` chose."
    ),
]
Uncertified = Annotated[
    bool,
    typer.Option("--uncertified", help="Without a certificate go on, and promise nothing. Default: answer nothing."),
]
Engine = Annotated[
    str | None, typer.Option(help="Ask this OpenAI-compatible server instead, e.g. http://127.0.0.1:8000/v1.")
]
EngineModel = Annotated[str | None, typer.Option(help="The model's id there. Default: the only one.")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine that share the questions. Default: this one.")
]
OutputDir = Annotated[Path, typer.Argument(help="The output_dir of a run.")]

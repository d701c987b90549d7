"""Commands of a model in service: `calibtrain answer`, `calibtrain serve`, `calibtrain monitor` and `calibtrain trust`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibtrain.cli_checks import asks, existing, trained
from calibtrain.cli_options import Engine, EngineModel, OutputDir, Source, Uncertified
from calibtrain.errors import UserError


def monitor(
    output_dir: OutputDir,
    audited: Annotated[Path, typer.Argument(help="Audited answers, one JSON a line with `abstained` and `correct`.")],
    source: Source = None,
    uncertified: Uncertified = False,
    engine: Engine = None,
    engine_model: EngineModel = None,
) -> None:
    """Watch refusals, hallucinations and the certificate in service.

    Exit code 1: the certificate or a word no longer holds. 2: bad input, or no certificate. 3: it failed and says nothing.
    """
    try:
        from calibtrain.pipeline.monitor import run

        asks(engine, engine_model)
        failed = run(
            existing(output_dir),
            audited,
            source=source,
            uncertified=uncertified,
            engine=engine,
            engine_model=engine_model,
        ).failed
    except UserError:
        raise
    except Exception as error:  # whatever it is, 1 is the alarm's alone
        typer.echo(
            f"monitor failed, and nothing is known of the certificate: {type(error).__name__}: {error}", err=True
        )
        raise typer.Exit(3) from None
    if failed:
        raise typer.Exit(1)


def answer(
    output_dir: OutputDir,
    question: Annotated[str, typer.Argument(help="In plain words.")],
    source: Source = None,
    group: Annotated[
        str | None, typer.Option(help="Value of the stratum that `certify --by` certified, e.g. Africa.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="One of the options to choose from, where the task chooses; repeat it.")
    ] = None,
    uncertified: Uncertified = False,
    engine: Engine = None,
    engine_model: EngineModel = None,
) -> None:
    """Answer a question with a calibrated probability, or abstain; first of all say what is certified, and of what."""
    if not question.strip():
        raise UserError("the question is empty")
    from calibtrain.pipeline.answer import load

    answerer = load(trained(output_dir), source, uncertified=uncertified, engine=engine, engine_model=engine_model)
    typer.echo(answerer.answer(question, group=group, options=option or ()).told())


def serve(
    output_dir: OutputDir,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1: this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Of one address; 0: as many as it likes.")] = 600,
    source: Source = None,
    uncertified: Uncertified = False,
) -> None:
    """Open a page to ask the model, and an OpenAI-compatible API whose replies carry their confidence."""
    from calibtrain.app.server import run

    run(
        trained(output_dir),
        host=host,
        port=port,
        requests_per_minute=requests_per_minute,
        source=source,
        uncertified=uncertified,
    )


def trust(output_dir: OutputDir) -> None:
    """Let the code run that the config of a run from elsewhere names: say so only of authors you trust."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline.own_code import trust as trusted

    lines = trusted(load_config(existing(output_dir) / "config.yaml"), output_dir)
    for line in [f"trusted: {line}" for line in lines] or ["it names no code but calibtrain's own"]:
        typer.echo(line)

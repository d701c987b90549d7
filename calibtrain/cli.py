"""The `calibtrain` command. Each command is a few lines over a library call; heavy imports wait until one is chosen."""

from __future__ import annotations

import os
import sys
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Annotated

import typer

from calibtrain.cli_checks import asks, check_model, on_processes, shares
from calibtrain.cli_checks import existing as _existing
from calibtrain.cli_checks import trained as _trained
from calibtrain.cli_options import Config, Engine, EngineModel, OutputDir, Overrides, Processes
from calibtrain.cli_plan import plan
from calibtrain.cli_push import push
from calibtrain.cli_serving import answer, monitor, serve, trust
from calibtrain.cli_weights import quantize, spectra
from calibtrain.errors import PREEMPTED, Preempted, UserError, short, told

app = typer.Typer(
    help="Fine-tune language models on DeepSpeed so that their confidence means what it says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")] = False,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one a GPU, without a GPU one.")
    ] = None,
) -> None:
    """Train, log calibration on the way and export the model."""
    from calibtrain.config_file import load_config

    loaded = load_config(config, overrides or [])
    from calibtrain.launchers.local import gpu_count, launch

    if dry_run:
        from calibtrain.dry_run import show

        show(loaded, num_processes or int(os.environ.get("WORLD_SIZE", 0)) or max(1, gpu_count()))
        return
    processes = num_processes or max(1, gpu_count())
    if processes > 1:
        from calibtrain.pipeline.check import check, check_rollout_engine

        check(loaded, processes)  # a mistake is told once, before any process starts
        check_rollout_engine(loaded)
        code = launch(config, overrides or [], num_processes=processes, output_dir=loaded.output_dir)
        if code:
            raise typer.Exit(code)
        return
    from calibtrain.pipeline.train import run

    run(loaded)


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory. Default: the model that the config starts from.")
    ] = None,
    split: Annotated[str, typer.Option(help="calibration, temperature, certification or test")] = "test",
    output: Annotated[Path | None, typer.Option(help="Write the graded answers here, one JSON a line.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Of a model that refuses: make it answer too, and count refusals.")
    ] = False,
    engine: Engine = None,
    engine_model: EngineModel = None,
    num_processes: Processes = None,
) -> None:
    """Let a model answer a split's questions and measure its calibration.

    With --engine, --model is the directory that the server serves: its tokenizer and template are asked with.
    """
    from calibtrain.config_file import load_config

    loaded = load_config(config, overrides or [])
    if split not in ("calibration", "temperature", "certification", "test"):
        raise UserError(f"--split: {split!r} is none of calibration, temperature, certification, test")
    if model is not None:
        check_model(model)
    on_processes(num_processes, alone="--engine" if engine else "--force" if force else None)
    from calibtrain.pipeline.evaluate import run

    if asks(engine, engine_model):
        if force:
            raise UserError("--force: needs the model itself; leave it out with --engine")
        from calibtrain.pipeline.served import serving

        run(loaded, model=model, split=split, output=output, load=serving(str(engine), engine_model))
        return
    if force:
        from calibtrain.pipeline.forced import run as run_forced

        run_forced(loaded, model=model, split=split)
        return
    run(loaded, model=model, split=split, output=output)


@app.command()
def calibrate(
    output_dir: OutputDir,
    target_risk: Annotated[
        float | None, typer.Option(help="Largest share of wrong answers among the given ones. Default: the config's.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Chance that the certificate is wrong.")] = None,
    source: Annotated[
        str,
        typer.Option(
            help="Of the confidence: likelihood, p_true, probe, p_ik, ensemble, ... (`calibtrain confidence`)"
        ),
    ] = "likelihood",
    of: Annotated[
        str | None, typer.Option(help="Members of --source ensemble. Default: likelihoods, and probes where fitted.")
    ] = None,
    engine: Engine = None,
    engine_model: EngineModel = None,
    num_processes: Processes = None,
) -> None:
    """Fit the temperature, or another source's calibrator, and certify the answer/abstain threshold of a trained model.

    Exit code 1 where something that was asked for cannot be certified.
    """
    shares({"--target-risk": target_risk, "--delta": delta})
    other = "--source" if source != "likelihood" else "--of" if of is not None else None
    on_processes(num_processes, alone="--engine" if engine else other)
    if asks(engine, engine_model):
        if source != "likelihood" or of is not None:
            raise UserError("--source, --of: a server returns log-probs alone; leave them out with --engine")
        from calibtrain.pipeline.engine import run as calibrate_engine

        found = calibrate_engine(
            _trained(output_dir), url=str(engine), name=engine_model, target_risk=target_risk, delta=delta
        )
    elif source != "likelihood" or of is not None:
        from calibtrain.pipeline.confidence import parse_sources
        from calibtrain.pipeline.source import run as calibrate_source

        members = parse_sources(of)
        found = calibrate_source(_trained(output_dir), source, members=members, target_risk=target_risk, delta=delta)
    else:
        from calibtrain.pipeline.calibrate import run

        found = run(_trained(output_dir), target_risk=target_risk, delta=delta)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def certify(
    output_dir: OutputDir,
    risk: Annotated[
        float | None, typer.Option(help="Largest share of wrong answers among the given ones. Default: the config's.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Chance that the certificate is wrong.")] = None,
    by: Annotated[str | None, typer.Option(help="Also certify every value of this stratum, e.g. continent.")] = None,
    hallucination: Annotated[
        float | None, typer.Option(help="Also control wrong answers as a share of all questions.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="New graded answers, from `evaluate --output`. Default: those kept by calibrate."),
    ] = None,
) -> None:
    """Certify a calibrated model anew, from kept or new answers, without running it.

    Exit code 1, and nothing written, where something that was asked for cannot be certified.
    """
    shares({"--risk": risk, "--delta": delta, "--hallucination": hallucination})
    from calibtrain.pipeline.certify import run

    found = run(_existing(output_dir), risk=risk, delta=delta, by=by, hallucination=hallucination, answers=answers)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def audit(
    output_dir: OutputDir,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to grade, drawn at random.")] = 200,
) -> None:
    """Write audit.jsonl: answers that a judge graded, for a person to grade too; `certify` then counts its errors."""
    from calibtrain.pipeline.audit import run

    typer.echo(str(run(_existing(output_dir), n)))


@app.command()
def probe(
    output_dir: OutputDir,
    layers: Annotated[
        str | None, typer.Option(help="Layers to choose from, e.g. 8,16,24. Default: eight, evenly spread.")
    ] = None,
    kind: Annotated[str, typer.Option(help="linear or mlp")] = "linear",
    questions: Annotated[int | None, typer.Option(min=1, help="At most so many of each split. Default: all.")] = None,
) -> None:
    """Fit a probe on hidden states that tells right answers from wrong ones, and compare it with likelihood."""
    from calibtrain.pipeline.probe import parse_kind, parse_layers, run

    run(_trained(output_dir), layers=parse_layers(layers), kind=parse_kind(kind), questions=questions)


@app.command()
def confidence(
    output_dir: OutputDir,
    sources: Annotated[
        str | None, typer.Option(help="Which to score, e.g. likelihood,p_true,probe. Default: all of the run's.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="At most so many of each split. Default: all.")] = None,
) -> None:
    """Compare sources of confidence on held-out questions: ranking, calibration and cost."""
    from calibtrain.pipeline.confidence import parse_sources, run

    run(_trained(output_dir), sources=parse_sources(sources), questions=questions)


for _command in (answer, serve, monitor, trust, plan, spectra, quantize, push):
    app.command()(_command)


@app.command()
def report(
    output_dir: Annotated[Path | None, typer.Argument(help="The output_dir of a run.")] = None,
    lm_eval: Annotated[
        Path | None, typer.Option(help="Instead of a run: samples that lm-evaluation-harness logged (--log_samples).")
    ] = None,
) -> None:
    """Write report.html: one file that works offline."""
    if lm_eval is not None and output_dir is None:
        from calibtrain.pipeline.lm_eval import run as report_samples

        typer.echo(str(report_samples(lm_eval)))
        return
    if output_dir is None or lm_eval is not None:
        raise UserError("give either the output_dir of a run or --lm-eval SAMPLES.jsonl")
    from calibtrain.pipeline.collect import run

    typer.echo(str(run(_existing(output_dir))))


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Run the whole job on the embedded model: measure, train, measure again, calibrate, report."""
    from calibtrain.config_file import load_config

    loaded = load_config("demo", overrides or [])
    from calibtrain.demo import run

    run(loaded)


@app.command()
def doctor() -> None:
    """Say what this machine can run, and how to mend what is missing."""
    from calibtrain.doctor import examine, show

    if not show(examine()):
        raise typer.Exit(1)


@app.command()
def losses() -> None:
    """List every loss with its paper, its config keys and its cost."""
    from calibtrain.loss_list import show

    show()


@app.command()
def version() -> None:
    """Print the version."""
    from calibtrain import __version__

    typer.echo(__version__)


def main() -> None:
    """Entry point: a user's mistake is one red message and exit code 2; a run that was asked to stop says so: 75."""
    try:
        app()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(PREEMPTED)
    except UserError as error:
        _tell(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        _tell(f"{short(error.filename)}: {error.strerror}")  # no file of ours has such a name
        sys.exit(2)


def _tell(message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(told(message), style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

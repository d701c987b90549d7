"""Commands about a model's weights: what training did to them, and fewer bits for them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from calibtrain.cli_checks import existing
from calibtrain.errors import UserError


def spectra(
    base: Annotated[str, typer.Argument(help="A Hugging Face directory, or the output_dir of a finished run.")],
    tuned: Annotated[
        Path | None,
        typer.Argument(help="What became of it: another directory, or a LoRA adapter's. Default: the run's."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Default: the run's output_dir, else spectra.")] = None,
    null_seeds: Annotated[int, typer.Option(min=0, help="Draws of each null model; 0: measure, test nothing.")] = 5,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest singular values to look at. Default: all, of wide matrices 256.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="E.g. 0-5,12. Default: all.")] = None,
    modules: Annotated[str | None, typer.Option(help="E.g. q_proj,down_proj. Default: all linear layers.")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Of a run of your own (its checkpoints are pickles): that step, in float32."),
    ] = None,
    write_without: Annotated[
        str | None,
        typer.Option(
            help="Write the model with its rotation, scale or residual undone to --output, and compare nothing."
        ),
    ] = None,
    random_rotation: Annotated[
        int | None, typer.Option(help="With --write-without rotation: a seed; turn as far, in random directions.")
    ] = None,
) -> None:
    """Tell what training did to the weights: singular values, rotations, and what of it is more than chance."""
    from calibtrain.pipeline.spectra import at_step, parse_layers, parse_modules, run, sides
    from calibtrain.pipeline.spectra import write_without as write
    from calibtrain.spectral import Settings

    of_layers, of_modules = parse_layers(layers), parse_modules(modules)
    if write_without is None:
        if random_rotation is not None:
            raise UserError("--random-rotation goes with --write-without rotation")
        if step is not None and tuned is not None:
            raise UserError("--step goes with the output_dir of a run, not with two models")
        settings = Settings(null_seeds=null_seeds, rank=rank)
        with nullcontext(sides(base, tuned)) if step is None else at_step(existing(Path(base)), step) as compared:
            found = run(compared, output=output, settings=settings, layers=of_layers, modules=of_modules)
        for finding in found["findings"]:
            typer.echo(finding["text"])
        typer.echo(str((output or compared.home) / "spectra.html"))
        return
    if output is None:
        raise UserError("--write-without: give --output, the directory that the model is written to")
    both = sides(base, tuned)
    write(both, write_without, output, random_rotation=random_rotation, layers=of_layers, modules=of_modules)
    typer.echo(str(output))


def quantize(
    source: Annotated[
        Path, typer.Argument(help="The output_dir of a finished run, or a Hugging Face directory with --questions.")
    ],
    scheme: Annotated[str, typer.Option(help="w4a16, w8a16, w8a8 or fp8: bits of weights and activations.")],
    method: Annotated[str, typer.Option(help="minmax, smoothquant, awq or preserve.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale: 32, 64 or 128. Default: the largest that divides all."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Weights with a zero point.")] = False,
    static: Annotated[bool, typer.Option("--static", help="One range of activations for all tokens.")] = False,
    observer: Annotated[
        str | None, typer.Option(help="With --static: minmax (default), percentile (99.9 %) or mse finds the range.")
    ] = None,
    kv_cache: Annotated[bool, typer.Option("--kv-cache", help="Keys and values in float8, too.")] = False,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A layer that stays in full precision, by name or re:PATTERN; repeatable.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How far outliers go to the weights (smoothquant, preserve). Default: .8, with --rotate .5.",
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Turn the residual stream first; a tied head becomes a matrix of its own.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="Calibration questions to quantise by, 128 to 512. Default: 256.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Refuse what loses more, e.g. auroc=0.01,coverage=0.05; also accuracy, ece, brier, changed."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Default: quantized/SCHEME-METHOD[-static][-kv8][-rotated] in the run, or in the working directory."
        ),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Graded questions for a Hugging Face directory: .jsonl, .json, .csv, .parquet.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="With --questions: plain or chat. Default: chat where the model has a template.")
    ] = None,
) -> None:
    """Quantise a model and calibrate and certify it anew, with a table of what that cost.

    Exit code 1: no certificate could be earned. 3: refused, for --keep asks for more than is left.
    """
    from calibtrain.pipeline.quantize_gate import parse_keep
    from calibtrain.pipeline.quantize_source import Asked
    from calibtrain.quantization.schemes import scheme_of

    bits = scheme_of(
        scheme, group_size=group_size, asymmetric=asymmetric, static=static, observer=observer, kv_cache=kv_cache
    )
    limits = parse_keep(keep)
    asked = Asked(bits, method, tuple(ignore or ()), alpha, rotate, samples, limits, output, questions, template)
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give the output_dir of a run or a Hugging Face directory")
    from calibtrain.pipeline.quantize import run

    found = run(source, asked)
    if found.path is None:
        typer.echo(found.refusal, err=True)
        raise typer.Exit(3)
    typer.echo(str(found.path))
    if found.calibrated.failures:
        raise typer.Exit(1)

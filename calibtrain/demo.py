"""The main job on one machine: measure, train under the deepspeed launcher, measure again, calibrate, report."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calibtrain.confidence.scorer import HEAD
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import settled, told
from calibtrain.pipeline import calibrate, collect
from calibtrain.pipeline.calibration_file import (
    made_by,
    made_by_source,
    read_calibration,
    served_source,
    weights_hash,
)
from calibtrain.pipeline.check import check
from calibtrain.pipeline.evaluate import Loaded, head_beside, measured_metrics, with_progress
from calibtrain.pipeline.measurement import Measurement, write_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.training.output_directory import check_replaceable

COLUMNS = {
    "acc": "accuracy",
    "mean_conf": "mean confidence",
    "ece15": "ECE",
    "ece_null": "ECE of a calibrated model",
    "brier": "Brier",
    "auroc": "AUROC",
    "cov@0.2": "answers at 20% risk",
}
RESULTS = (
    *("model", "adapter", "checkpoints", "answers", "probe", "sources", "confidence", "confidence_head", "errors"),
    *(
        "metrics.jsonl",
        "calibration.json",
        "outside.safetensors",
        "report.html",
        "spectra.json",
        "spectra.html",
        "run.json",
    ),
)
"""What a run leaves behind that speaks of its model."""


def run(config: RunConfig) -> Path:
    """Run the whole job into config.output_dir. Returns the report's path."""
    from calibtrain.launchers.local import launch

    console = Console(highlight=False)
    started = time.monotonic()
    output = config.output_dir
    earlier = check_replaceable(config)
    for name, records in check(config, 1, replace=True).prepared.splits.items():
        if not records and name != "validation":  # its loss is told where it is asked for
            raise UserError(f"data.splits.{name}: 0; the demo needs some of each split")
    if earlier:
        console.print(f"{output} holds an earlier run of this name: its results are replaced")
        for name in RESULTS:
            shutil.rmtree(output / name, ignore_errors=True)
            if (output / name).is_file():
                (output / name).unlink()
    output.mkdir(parents=True, exist_ok=True)
    console.rule("1/4  the raw model", align="left")
    if config.model.dtype == "auto":
        console.print(told(config))
        config = settled(config)
    # In a process of its own, whose memory is free again when training starts.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        raw = pool.submit(_measure_raw, config).result()
    write_measurement(raw, output / "answers" / "raw_test.jsonl", made_by_source(config.model))
    console.rule("2/4  fine-tuning", align="left")
    resolved = output / "config.yaml"
    dump_config(config, resolved)
    # One process with all cores: two of them send each other every gradient and weight, which takes longer than a step.
    code = launch(str(resolved), [], num_processes=1, output_dir=output)
    if code:
        raise UserError(f"training ended with exit code {code}; its cause is above and in {output / 'errors'}")
    console.rule("3/4  the fine-tuned model", align="left")
    test = prepare(config).splits["test"]
    loaded = Loaded(config, output / "model")
    loaded.head = head_beside(output / "model", loaded.template)
    tuned = with_progress(loaded, test, (), "answering test questions")
    mark = made_by(weights_hash(output / "model"), loaded.template.hash)
    write_measurement(tuned, output / "answers" / "test.jsonl", mark)
    del loaded  # calibration loads its own
    calibrated = calibrate.run(output)
    console.rule("4/4  the report", align="left")
    report = collect.run(output)
    by_head = read_calibration(output, source=HEAD).calibrator if served_source(output) == HEAD else None
    console.print(_table(raw, tuned, calibrated.calibrator, by_head))
    console.print(f"report: {report}   ({(time.monotonic() - started) / 60:.1f} minutes)")
    for failure in calibrated.failures:
        console.print(f"{failure}; so it answers nothing that is not certified", style="bold red", markup=False)
    console.print(f'ask it: calibtrain answer {output} "In which country is the city of Lyon?"')
    return report


def _measure_raw(config: RunConfig) -> Measurement:
    prepared = prepare(config)
    return with_progress(Loaded(config), prepared.splits["test"], prepared.shots, "answering test questions, few-shot")


def _table(
    raw: Measurement, tuned: Measurement, calibrator: calibrate.Calibrator, by_head: calibrate.Calibrator | None
) -> Table:
    columns = {
        "raw model": measured_metrics(raw.confidence, raw.correct),
        "fine-tuned": measured_metrics(tuned.confidence, tuned.correct),
        "with temperature": measured_metrics(calibrator.apply(tuned.table), tuned.correct),
    }
    if by_head is not None and tuned.told is not None:
        columns["with confidence head"] = measured_metrics(by_head.apply(tuned.told), tuned.correct)
    table = Table(title=f"{len(tuned.answers)} test questions, used for nothing else", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in COLUMNS.items():
        table.add_row(label, *(f"{metrics[key]:.3f}" for metrics in columns.values()))
    return table

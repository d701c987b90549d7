"""SFT, plain ORPO and calibrated ORPO on the same data, steps and model, each also with a temperature after.

Two regimes: one pass over 1,200 fresh pairs, and 400 pairs for 4 epochs, as most fine-tunes are. Every number is of
held-out questions; temperatures are fitted on a split of their own. Nothing of the term enters the task's loss (it moves
only the logit scale), so one training run gives both: its last weights are plain ORPO, its exported model is calibrated
ORPO.

    python benchmarks/calibration_study.py --seeds 3 --json benchmarks/results/calibration_study.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import print_table, write_json

REGIMES = {
    "fresh": ["data.splits.train=1200", "training.epochs=1"],
    "repeated": ["data.splits.train=400", "training.epochs=4"],
}
ARMS = ("sft", "orpo", "calibrated_orpo")
METRICS = (
    "acc",
    "mean_conf",
    "ece15",
    "ece_null",
    "ece_debiased",
    "ece_rms_debiased",
    "brier",
    "auroc",
    "aurc",
    "cov@0.1",
    "cov@0.2",
)


def main() -> None:
    """Train, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keeps answers here; runs that are already there are not repeated")
    parser.add_argument(
        "--override", action="append", default=[], help="changes to configs/demo.yaml, for a quick look"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        jobs = [
            (str(work), regime, kind, seed, arguments.override)
            for kind in ("orpo", "sft")
            for regime in ("repeated", "fresh")
            for seed in range(arguments.seeds)
        ]
        jobs = [(str(work), "raw", "raw", seed, arguments.override) for seed in range(arguments.seeds)] + jobs
        with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
            for done in pool.imap_unordered(start, jobs):
                print(f"measured: {done}", flush=True)
        rows = collect(work, arguments.seeds)
    for regime in ("raw", *REGIMES):
        shown = ("arm", "temperature", *METRICS)
        table = [{key: one[key] for key in shown} for one in rows if one["regime"] == regime]
        print_table(f"{regime}: {rows[0]['n']} questions, mean over {arguments.seeds} seeds", table)
    result = summary(rows)
    print(json.dumps(result, indent=2))
    if arguments.json:
        write_json(arguments.json, rows, result)


def start(job: tuple[str, str, str, int, list[str]]) -> str:
    """Run one job in a process of its own, with one thread."""
    work, regime, kind, seed, overrides = job
    label = f"{regime}-{kind}-{seed}"
    if (Path(work) / f"{label}.done").is_file():
        return f"{label} (kept)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    code = "import calibration_study, json, sys; calibration_study.work(json.loads(sys.argv[1]))"
    argv = [sys.executable, "-c", code, json.dumps([work, regime, kind, seed, overrides])]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    log = Path(work) / f"{label}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    (Path(work) / f"{label}.done").touch()
    return label


def work(job: Sequence[Any]) -> None:
    """Train one run and write the graded answers of its models."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import train
    from calibtrain.pipeline.evaluate import Loaded
    from calibtrain.pipeline.measurement import write_measurement
    from calibtrain.pipeline.prepare import prepare

    folder, regime, kind, seed, overrides = Path(job[0]), job[1], job[2], job[3], job[4]
    output = folder / f"run-{regime}-{kind}-{seed}"
    settings = [f"seed={seed}", f"output_dir={output}", "tracking.wandb=false", "training.zero_stage=1"]
    settings += ["training.micro_batch_size=8", *REGIMES.get(regime, [])]
    if kind == "sft":
        settings += ["objective={name: sft}", "penalties=[]"]
    config = load_config("demo", [*settings, *overrides])
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    prepared = prepare(config)
    models: dict[str, Path | None] = {"raw": None}
    if kind == "orpo":
        models = {"orpo": output / "last", "calibrated_orpo": output / "model"}
        train.run(config, last_weights=output / "last")
    elif kind == "sft":
        models = {"sft": output / "model"}
        train.run(config)
    for arm, model in models.items():
        loaded = Loaded(config, model)
        shots = prepared.shots if model is None else ()
        splits = ("test",) if model is None else ("test", "temperature")
        for split in splits:
            measurement = loaded.measure(prepared.splits[split], shots)
            write_measurement(measurement, folder / "answers" / f"{regime}-{arm}-{seed}-{split}.jsonl")
    shutil.rmtree(output, ignore_errors=True)


def collect(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """One row per regime, arm and calibration: means over seeds, with the seeds' spread and the questions' interval."""
    cases = [("raw", "raw", False)]
    cases += [(regime, arm, temperature) for regime in REGIMES for arm in ARMS for temperature in (False, True)]
    rows = [row(folder, regime, arm, seeds, temperature) for regime, arm, temperature in cases]
    return [one for one in rows if one["seeds"]]  # a study cut short shows what it has


def row(folder: Path, regime: str, arm: str, seeds: int, with_temperature: bool) -> dict[str, Any]:
    """Metrics of one arm: mean, `_sd` over seeds, `_low` and `_high` of a 95% bootstrap over questions (mean of seeds)."""
    from calibtrain.calibration.calibrators import fit_calibrator
    from calibtrain.calibration.intervals import bootstrap, sample_ids
    from calibtrain.calibration.metrics import summary as all_metrics
    from calibtrain.pipeline.evaluate import measured_metrics
    from calibtrain.pipeline.measurement import read_measurement

    found, intervals, temperatures = [], [], []
    measured = [seed for seed in range(seeds) if (folder / "answers" / f"{regime}-{arm}-{seed}-test.jsonl").is_file()]
    for seed in measured:
        test = read_measurement(folder / "answers" / f"{regime}-{arm}-{seed}-test.jsonl")
        confidence = test.confidence
        if with_temperature:
            held_out = read_measurement(folder / "answers" / f"{regime}-{arm}-{seed}-temperature.jsonl")
            calibrator = fit_calibrator(
                "temperature", held_out.table, held_out.correct, template_hash="", weights_hash="", replicates=0
            )
            confidence = calibrator.apply(test.table)
            temperatures.append(calibrator.temperature)
        found.append(measured_metrics(confidence, test.correct))
        ids = sample_ids([answer.question_id for answer in test.answers])
        chosen = lambda state: {key: value for key, value in all_metrics(state).items() if key in METRICS}  # noqa: E731
        intervals.append(bootstrap(chosen, confidence, test.correct, ids, replicates=200))
    result: dict[str, Any] = {"regime": regime, "arm": arm, "temperature": with_temperature, "seeds": len(measured)}
    if not measured:
        return result
    result["n"] = int(found[0]["n"])
    if temperatures:
        result["T"] = float(np.mean(temperatures))
    for key in METRICS:
        values = np.array([metrics[key] for metrics in found])
        result[key] = float(values.mean())
        result[f"{key}_sd"] = float(values.std(ddof=1)) if len(measured) > 1 else float("nan")
        result[f"{key}_low"] = float(np.mean([one[key].low for one in intervals]))
        result[f"{key}_high"] = float(np.mean([one[key].high for one in intervals]))
    return result


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The comparison that matters: calibrated against plain ORPO before any temperature, in the repeated regime."""

    def compare(regime: str) -> dict[str, float]:
        arms = {one["arm"]: one for one in rows if one["regime"] == regime and not one["temperature"]}
        if not {"orpo", "calibrated_orpo"} <= set(arms):
            return {}
        plain, calibrated = arms["orpo"], arms["calibrated_orpo"]
        return {
            "ece_plain_orpo": plain["ece_debiased"],
            "ece_calibrated_orpo": calibrated["ece_debiased"],
            "ece_rms_plain_orpo": plain["ece_rms_debiased"],
            "ece_rms_calibrated_orpo": calibrated["ece_rms_debiased"],
            "accuracy_delta": calibrated["acc"] - plain["acc"],
            "auroc_delta": calibrated["auroc"] - plain["auroc"],
            "seeds": plain["seeds"],
        }

    return {**compare("repeated"), **{f"fresh_{key}": value for key, value in compare("fresh").items()}}


if __name__ == "__main__":
    main()

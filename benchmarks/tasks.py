"""Every kind of task, from training to certificate, on the embedded model: accuracy, calibration, order and guarantee.

    python benchmarks/tasks.py --work WORK --json benchmarks/results/tasks.json

For each config of examples/tasks its maker writes as many rows as --rows, half of which may train; SmolLM2-135M learns them
by SFT, then answers the temperature, certification and test questions. `violation_rate` is how often the certificate at 20 %
risk is broken over 200 re-splits of the graded answers (at most delta, 5 %). What is finished in --work is not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import print_table, write_json
from certificate_validity import resplits

from calibtrain.abstention.claims import claims_threshold, conformal_scores
from calibtrain.calibration.metrics import ece_debiased
from calibtrain.calibration.ranking import auroc
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, load_config
from calibtrain.pipeline import calibrate, collect, evaluate
from calibtrain.pipeline.answer_parts import part_probabilities
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.measurement import Measurement, read_measurement

GALLERY = Path(__file__).parents[1] / "examples" / "tasks"
SPLITS = 200
RISK = 0.2


def config_of(name: str, work: Path, rows: int, sizes: dict[str, int]) -> RunConfig:
    """The gallery's config with more rows, on the embedded model."""
    sys.path.insert(0, str(GALLERY))
    import make

    data = work / "data"
    if not (data / f"{name}.jsonl").is_file():
        make.write(rows, data, [name])
    splits = {f"data.splits.{split}": size for split, size in sizes.items()}
    changes: dict[str, Any] = {
        "data.source.path": data / f"{name}.jsonl",
        "output_dir": work / name,
        "tracking.wandb": "false",
        **splits,
    }
    return load_config(GALLERY / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()])


def run_one(name: str, work: Path, rows: int, sizes: dict[str, int], processes: int) -> dict[str, Any]:
    """One kind's row of the table."""
    config = config_of(name, work, rows, sizes)
    output = config.output_dir
    if not (output / "model" / "config.json").is_file():
        from calibtrain.launchers.local import launch

        output.mkdir(parents=True, exist_ok=True)
        dump_config(config, output / "given.yaml")
        code = launch(str(output / "given.yaml"), [], num_processes=processes, output_dir=output)
        assert not code, f"{name}: training ended with exit code {code}"
    config = load_config(output / "config.yaml")
    answers = output / "answers" / "test.jsonl"
    if not answers.is_file():
        evaluate.run(config, model=output / "model", split="test", output=answers)
    if not (output / "calibration.json").is_file():
        calibrate.run(output, target_risk=RISK)
    collect.run(output)
    test, calibrated = read_measurement(answers), read_calibration(output)
    confidence = calibrated.calibrator.apply(test.scores(config.calibration.domain))
    certificate, split = calibrated.certification.certificate, resplits(output, SPLITS)
    return {
        "kind": name,
        "n": len(test.answers),
        "accuracy": float(test.correct.mean()),
        "not_found": sum(not one.found for one in test.answers),
        "ece_before": ece_debiased(state(test.confidence, test)),
        "ece": ece_debiased(state(confidence, test)),
        "auroc": auroc(state(confidence, test)),
        "coverage": certificate.coverage if certificate else 0.0,
        "violations": split["violation_rate"],
        "violations_low": split["violation_low"],
        "certified": split["certified"],
    }


def claims_resplits(output: Path) -> dict[str, float]:
    """Where claims are withheld one by one, over draws of graded replies from all of them, which are the population.

    The mean share of replies that keep a wrong claim (at most RISK, by the form that is applied), how often that share is
    above RISK by the form with delta, and the share of claims kept; NaN elsewhere.
    """
    calibrated = read_calibration(output)
    if calibrated.parts is None or not calibrated.claims:
        return dict.fromkeys(("replies_with_a_wrong_claim", "claims_violations", "claims_kept"), math.nan)
    paths = [output / "answers" / f"{split}.jsonl" for split in ("certification", "test")]
    answers = [one for path in paths for one in read_measurement(path).answers]
    probability = [np.asarray(one) for one in part_probabilities(calibrated.parts, answers)]
    scores = conformal_scores(probability, [np.array([bool(part.correct) for part in one.parts]) for one in answers])
    rng, claims = np.random.default_rng(0), np.concatenate(probability)
    wrong, broken, kept = [], [], []
    for _ in range(SPLITS):
        drawn = scores[rng.integers(0, len(scores), len(scores) // 2)]
        threshold, sure = claims_threshold(drawn, RISK), claims_threshold(drawn, RISK, 0.05)
        wrong.append(float((scores >= threshold).mean()))
        broken.append(float((scores >= sure).mean()) > RISK)
        kept.append(float((claims >= threshold).mean()))
    return {
        "replies_with_a_wrong_claim": float(np.mean(wrong)),
        "claims_violations": float(np.mean(broken)),
        "claims_kept": float(np.mean(kept)),
    }


def state(confidence: Any, test: Measurement) -> CalibrationState:
    """Calibration of these confidences of the test answers."""
    return state_of(torch.as_tensor(confidence), torch.from_numpy(test.correct))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--work", type=Path, required=True, help="runs are kept here and gone on with")
    parser.add_argument("--kinds", nargs="+", default=sorted(path.stem for path in GALLERY.glob("*.yaml")))
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--fit", type=int, default=250, help="answers that fit the calibrator")
    parser.add_argument("--held-out", type=int, default=400, help="answers that certify, and as many that test")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    sizes = {"train": args.train, "calibration": 0, "temperature": args.fit}
    sizes |= {"certification": args.held_out, "test": args.held_out}
    rows = [run_one(name, args.work.resolve(), args.rows, sizes, args.processes) for name in args.kinds]
    for row in rows:
        row |= claims_resplits(args.work / row["kind"])
    print_table(f"{args.held_out} test questions of each kind, certificates at {RISK:.0%} risk", rows)
    summary = {f"ece_{row['kind']}": row["ece"] for row in rows}
    summary |= {f"violations_{row['kind']}": row["violations"] for row in rows}
    for row in rows:
        summary |= {key: row[key] for key in row if "claim" in key and not math.isnan(row[key])}
    if args.json:
        write_json(args.json, rows, summary)


if __name__ == "__main__":
    main()

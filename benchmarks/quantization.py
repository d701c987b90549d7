"""What bits cost in confidence: every scheme and method on real questions, beside llm-compressor's on the same texts.

    calibtrain demo
    python benchmarks/quantization.py --run out --work work --peer PYTHON --json PATH

--peer: the interpreter of an environment with llm-compressor (it wants another transformers than ours). Each model
answers the run's own splits: the calibrator is fitted on `temperature`, the certificate earned on `certification`, and
the table is of `test`. Two models: the run's, and the one that it started from, which is shown examples in its prompt.
half1 and half2 are the run's model, quantised by either half of the texts: how much a result owes to the draw.
What lies in --work is not made again. --time alternates the passes in turn and does nothing else: give it an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _report import print_table, write_json

from calibtrain.calibration.calibrators import Calibrator
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.data.calibration_set import choose_calibration_set
from calibtrain.models.loading import local_path
from calibtrain.pipeline import calibrate
from calibtrain.pipeline.calibration_file import Calibrated, weights_hash
from calibtrain.pipeline.evaluate import Loaded, with_progress
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.quantize import side_of
from calibtrain.pipeline.quantize_full import own_answers
from calibtrain.pipeline.quantize_table import changes, compare
from calibtrain.quantization.blocks import Text, find_blocks
from calibtrain.quantization.rotation import rotate_block, rotate_outside, rotation_of
from calibtrain.quantization.run import ALPHA, ROTATED_ALPHA, Settings, quantize_directory
from calibtrain.quantization.schemes import scheme_of
from calibtrain.records import Record

RISK, DELTA, GROUP = 0.2, 0.1, 32
OURS, PEER = "calibtrain", "llm-compressor"
CELLS = (
    (OURS, "w8a8", "minmax"),
    (OURS, "w8a8", "smoothquant"),
    (OURS, "w8a8", "preserve"),
    (OURS, "w8a8", "minmax-rotated"),
    (OURS, "w8a8", "smoothquant-rotated"),
    (OURS, "w8a8", "preserve-rotated"),
    (OURS, "full", "rotated"),
    (OURS, "w8a16", "minmax"),
    (OURS, "fp8", "minmax"),
    (OURS, "w4a16", "minmax"),
    (OURS, "w4a16", "awq"),
    (OURS, "w4a16", "preserve"),
    (OURS, "w4a16", "preserve-rotated"),
    (PEER, "w8a8", "minmax"),
    (PEER, "w8a8", "smoothquant"),
    (PEER, "w4a16", "minmax"),
    (PEER, "w4a16", "awq"),
    (PEER, "w4a16", "gptq"),
)
"""(tool, scheme, method): 4 bits in symmetric groups of 32, SmoothQuant at .8, and at .5 where the stream is rotated.
full, rotated: nothing is quantised, so that what the rotation itself costs is seen."""

SHOWN = (
    *("model", "tool", "scheme", "method", "accuracy", "ece_old_calibrator", "ece_refitted", "auroc"),
    *("certified_coverage", "changed_answers", "changed_certification"),
)


@dataclass(frozen=True)
class Model:
    """A model in full precision, and what it is asked."""

    name: str
    path: Path
    config: RunConfig
    splits: dict[str, list[Record]]
    shots: Sequence[Record]
    texts: list[Text]
    measured: dict[str, Measurement]
    calibrated: Calibrated


def measured(
    config: RunConfig, path: Path, splits: dict[str, list[Record]], shots: Sequence[Record], kept: Path
) -> Any:
    """A model's graded answers to the three splits; those that are kept are read."""
    found, loaded = {}, None
    for split in ("temperature", "certification", "test"):
        file = kept / f"{split}.jsonl"
        if not file.is_file():
            loaded = loaded or Loaded(config, path)
            write_measurement(with_progress(loaded, splits[split], shots, f"answering {split}"), file)
        found[split] = read_measurement(file)
    return found


def certified(config: RunConfig, found: dict[str, Measurement], path: Path) -> Calibrated:
    """The calibrator and certificate of these answers."""
    calibrator: Calibrator = calibrate.fit(config, found["temperature"], "benchmark", weights_hash(path))
    return calibrate.certified(config, calibrator, found["certification"], RISK, DELTA)


def model_of(name: str, run: Path, work: Path, samples: int, questions: int) -> Model:
    """The run's model, or the one that it started from."""
    config = load_config(run / "config.yaml")
    prepared = prepare(config)
    splits = {**prepared.splits, "test": prepared.splits["test"][:questions]}
    path = Path(local_path(config.model.source)) if name == "start" else run / "model"
    shots = prepared.shots if name == "start" else ()
    folder = work / ("start" if name == "start" else "tuned")
    found = measured(config, path, splits, shots, folder / "full")
    file = folder / "texts.json"
    if not file.is_file():
        # With examples in its prompt a text is some five times as long.
        chosen = choose_calibration_set(splits["calibration"], samples // 4 if name == "start" else samples)
        texts = own_answers(Loaded(config, path), chosen, shots)
        file.write_text(json.dumps([[list(one.prompt), list(one.answer)] for one in texts]))
    texts = [Text(*one) for one in json.loads(file.read_text())]
    if name.startswith("half"):
        texts = texts[int(name[-1]) - 1 :: 2]
    return Model(name, path, config, splits, shots, texts, found, certified(config, found, path))


def quantize(model: Model, cell: tuple[str, str, str], target: Path, work: Path, peer: str | None) -> float:
    """Write the quantised directory. Returns the seconds it took."""
    tool, scheme, method = cell
    shutil.rmtree(target, ignore_errors=True)
    started = time.monotonic()
    if tool == OURS and scheme == "full":
        write_rotated(model.path, target)
        return time.monotonic() - started
    if tool == OURS:
        plain, _, rotated = method.partition("-")
        group = GROUP if scheme.endswith("a16") else None
        alpha = ROTATED_ALPHA if rotated else ALPHA
        settings = Settings(scheme_of(scheme, group_size=group), plain, alpha=alpha, rotate=bool(rotated))
        quantize_directory(model.path, target, model.texts, settings)
        return time.monotonic() - started
    texts = work / model.name / "texts_peer.json"
    texts.write_text(json.dumps([[*one.prompt, *one.answer] for one in model.texts]))
    script = Path(__file__).with_name("_quantization_peer.py")
    command = [str(peer), str(script), str(model.path), str(texts), str(target), scheme, method, str(GROUP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(cell)}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def write_rotated(source: Path, target: Path) -> None:
    """A model directory with its stream rotated, in its own dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rotation = rotation_of(model)
    for block in find_blocks(model)[1]:
        rotate_block(model, block, rotation)
    rotate_outside(model, rotation)
    model.config.tie_word_embeddings = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def row_of(model: Model, cell: tuple[str, str, str], work: Path, peer: str | None) -> dict[str, Any]:
    """One line of the table."""
    folder = work / model.name / "-".join(cell)
    path, facts = folder / "model", folder / "seconds.json"
    if not facts.is_file():
        seconds = quantize(model, cell, path, work, peer)
        facts.write_text(json.dumps(seconds))
    found = measured(model.config, path, model.splits, model.shots, folder)
    own = certified(model.config, found, path)
    before = side_of(model.config, model.measured, model.calibrated, model.calibrated.calibrator)
    after = side_of(model.config, found, own, model.calibrated.calibrator)
    table = compare(before, after, risk=RISK, delta=DELTA)
    rows, changed = table["rows"], table["changed"]
    return {
        "model": model.name,
        "tool": cell[0],
        "scheme": cell[1],
        "method": cell[2],
        "accuracy": rows["accuracy"]["after"],
        **{f"{key}_delta": rows[key]["difference"] for key in ("accuracy", "auroc", "brier", "aurc")},
        **{f"{key}_delta_{end}": rows[key][end] for key in ("accuracy", "auroc") for end in ("low", "high")},
        "auroc": rows["auroc"]["after"],
        "ece_old_calibrator": rows["ece_debiased_old"]["after"],
        "ece_refitted": rows["ece_debiased"]["after"],
        "coverage_test": rows["coverage"]["after"],
        "coverage_test_kept": rows["coverage"]["after"] / rows["coverage"]["before"],
        "certified_coverage": rows["certified_coverage"]["after"],
        "coverage_kept": (rows["certified_coverage"]["after"] or 0.0) / (rows["certified_coverage"]["before"] or 1.0),
        "changed_answers": changed["changed"],
        "changed_certification": changes(model.measured["certification"].answers, found["certification"].answers)[
            "changed"
        ],
        "wrong_to_right": changed["wrong_to_right"],
        "right_to_wrong": changed["right_to_wrong"],
        "megabytes": sum(one.stat().st_size for one in path.glob("*.safetensors")) / 1e6,
    }


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the run's model under plain names, of others behind theirs; peers behind `peer_`."""
    found: dict[str, float] = {}
    keys = ("accuracy_delta", "auroc_delta", "ece_old_calibrator", "ece_refitted", "coverage_kept", "changed_answers")
    for row in rows:
        first = ("" if row["model"] == "tuned" else f"{row['model']}_") + ("peer_" if row["tool"] == PEER else "")
        for key in keys:
            found[f"{first}{key}_{row['scheme']}_{row['method']}"] = row[key]
    for scheme in ("w4a16", "w8a8"):
        peers = [one for one in rows if one["tool"] == PEER and one["scheme"] == scheme and one["model"] == "tuned"]
        if peers:
            best = min(peers, key=lambda one: one["changed_answers"])
            found[f"best_peer_auroc_delta_{scheme}"] = max(one["auroc_delta"] for one in peers)
            found[f"best_peer_changed_answers_{scheme}"] = best["changed_answers"]
    return found


def timed(model: Model, work: Path, peer: str | None, repeats: int) -> list[dict[str, Any]]:
    """Seconds of each pass, ours and the peer's in turn."""
    cells = [cell for cell in CELLS if cell[1] != "full" and cell[2] != "minmax" and (peer or cell[0] == OURS)]
    taken: dict[tuple[str, str, str], list[float]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for cell in cells:
            taken[cell].append(quantize(model, cell, work / "timed", work, peer))
    shutil.rmtree(work / "timed", ignore_errors=True)
    return [
        {"tool": tool, "scheme": scheme, "method": method, "seconds": statistics.median(seconds)}
        | {"low": min(seconds), "high": max(seconds), "samples": len(model.texts)}
        for (tool, scheme, method), seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a finished run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", help="interpreter of an environment with llm-compressor; without it none is measured")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--models", default="tuned,start,half1,half2")
    parser.add_argument("--methods", help="E.g. minmax,awq. Default: all")
    parser.add_argument("--kept", action="store_true", help="only what lies in --work")
    parser.add_argument("--time", type=int, metavar="REPEATS", help="time the passes instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    methods = options.methods.split(",") if options.methods else {method for _, _, method in CELLS}
    cells = [cell for cell in CELLS if (options.peer or options.kept or cell[0] == OURS) and cell[2] in methods]
    rows: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for name in options.models.split(","):
        model = model_of(name, options.run, options.work, options.samples, options.questions)
        if options.time:
            rows = timed(model, options.work, options.peer, options.time)
            break
        for cell in cells if not name.startswith("half") else [(OURS, "w4a16", "preserve")]:
            if options.kept and not (options.work / name / "-".join(cell) / "test.jsonl").is_file():
                continue
            rows.append(row_of(model, cell, options.work, options.peer))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if not options.time:
        summary = summary_of(rows)
    if options.time:
        print_table("seconds of a pass", rows)
    else:
        print_table("what bits cost in confidence", [{key: row[key] for key in SHOWN} for row in rows])
    if options.json:
        write_json(options.json, rows, summary)


if __name__ == "__main__":
    main()

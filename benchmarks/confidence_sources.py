"""Every source of confidence on held-out questions: ranking, calibration, certified coverage, cost.

    python benchmarks/confidence_sources.py --json sources.json --model out/model --config out/config.yaml

The raw model (few-shot) and, with --model, a fine-tuned one answer the questions of the config's data. Splits share no
question: `train` fits the probes (its first questions, which the fine-tuned model learned from, are left out),
`calibration` the ensemble, `temperature` Platt's two numbers of each source, `certification` the thresholds; `test` is
measured and used for nothing else. Answers and scores lie in --work as they are made: the same command goes on there.

ECE: 15 bins, and debiased, since at n = 1,000 a perfectly calibrated model shows about 0.03 by chance (`ece_null`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import print_table, write_json

from calibtrain.abstention.certificate import certify
from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.calibration.metrics import ece_null
from calibtrain.calibration.state import state_of
from calibtrain.confidence.ensemble import fit_ensemble
from calibtrain.confidence.features import POSITIONS, Features, Fingerprint, collect_features, default_layers, depth_of
from calibtrain.confidence.probe import Probe, fit_probe
from calibtrain.confidence.sampling import SAMPLES
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.confidence.sources import FAMILIES, SOURCES
from calibtrain.config_file import load_config
from calibtrain.distributed import World
from calibtrain.models.loading import local_path
from calibtrain.pipeline.calibrate import weights_hash
from calibtrain.pipeline.confidence import Scored, difference, row_of, score_split
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.prepare import prepare

LIKELIHOODS = next(iter(FAMILIES))
RISKS, DELTA = (0.1, 0.2), 0.05
PROBES = {"question_last": "p_ik", "answer_last": "probe_answer_last", "answer_mean": "probe_answer_mean"}
"""Probes by position; that of the question's last token knows no answer: P(IK), which can route before generation."""


def measure(name: str, model: Path | None, config_path: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a source for one model."""
    config = load_config(config_path)
    learned = config.data.splits.train
    sizes = {"train": learned + settings.fit, "calibration": settings.ensemble, "temperature": settings.calibrate}
    sizes |= {"certification": settings.certify, "test": settings.questions}
    wanted = config.data.model_copy(update={"splits": config.data.splits.model_copy(update=sizes)})
    config = config.model_copy(update={"data": wanted})
    prepared, loaded = prepare(config), Loaded(config, model)
    shots = tuple(prepared.shots) if model is None else ()
    folder = Path(local_path(config.model.source)) if model is None else model
    fingerprint = Fingerprint(weights_hash(folder), loaded.template.hash)
    asker = Asker(loaded.model, loaded.template, config.evaluation, shots, loaded.device, settings.seed)
    splits = {**prepared.splits, "train": prepared.splits["train"][learned:]}
    work = settings.work / name
    scored, features = {}, {}
    for split, records in splits.items():
        start, cheap = time.perf_counter(), split == "train"
        names = LIKELIHOODS if cheap else settings.sources
        scored[split] = score_split(asker, records, work / split, names, fingerprint)
        # Without examples before the question: a probe learns what it needs, and a pass costs a tenth.
        features[split] = collect_features(
            loaded.model,
            loaded.template,
            records,
            [answer.text for answer in scored[split].answers],
            work / "features" / f"{split}-{len(records)}",
            layers=default_layers(depth_of(loaded.model), settings.layers),
            depth=depth_of(loaded.model),
            fingerprint=fingerprint,
            world=World(0, 1, 0, loaded.device),
        )
        print(f"{name}, {split}: {len(records)} questions, {time.perf_counter() - start:.0f} s", flush=True)
    add_probes(scored, features, work / "probes", fingerprint, settings.seed)
    add_ensembles(scored, fingerprint, settings.seed)
    return rows_of(name, scored, fingerprint)


def add_probes(
    scored: Mapping[str, Scored],
    features: Mapping[str, Features],
    folder: Path,
    fingerprint: Fingerprint,
    seed: int,
) -> None:
    """A probe for each position, fitted on `train`, and `probe`, the one that its own choosing part likes best."""
    fitted: dict[str, Probe] = {}
    fit = scored["train"]
    for position in POSITIONS:
        own = folder / f"{position}-{len(fit.answers)}"
        if (own / "probe.json").is_file():
            fitted[position] = Probe.load(own, fingerprint)
        else:
            fitted[position] = fit_probe(features["train"], fit.correct, fit.ids, positions=(position,), seed=seed)
            fitted[position].save(own)
    best = min(POSITIONS, key=lambda position: fitted[position].candidates[0].log_loss)
    for split, one in scored.items():
        if split == "train":
            continue
        cost = Cost(np.ones(len(one.answers)), features[split].tokens.astype(np.float64))
        for position, name in PROBES.items():
            one.scores[name] = SourceScores(fitted[position].score(features[split]), cost, True)
        one.scores["probe"] = one.scores[PROBES[best]]


def add_ensembles(scored: Mapping[str, Scored], fingerprint: Fingerprint, seed: int) -> None:
    """`ensemble_cheap` of the likelihoods and probes (one more pass), `ensemble` of all; fitted on `calibration`."""
    fit = scored["calibration"]
    every = tuple(name for name in fit.scores if name != "probe")
    for title, names in (("ensemble_cheap", (*LIKELIHOODS, *PROBES.values())), ("ensemble", every)):
        made = fit_ensemble(
            {name: fit.scores[name].values for name in names}, fit.correct, fingerprint, sources=names, seed=seed
        )
        for split, one in scored.items():
            if split != "train":
                values = made.score({name: one.scores[name].values for name in names})
                one.scores[title] = SourceScores(values, cost_of(one, names), True)


def cost_of(one: Scored, names: Sequence[str]) -> Cost:
    """Cost of several sources; those of one family, and the probes, share their work."""
    total = Cost.none(len(one.answers))
    for members in [*FAMILIES, tuple(PROBES.values())]:
        used = [name for name in members if name in names]
        # The two statements, and both second passes, are asked apart.
        apart = used if members[0] in ("stated_number", "second_pass") else used[:1]
        for name in apart:
            total = total.plus(one.scores[name].cost)
    return total


def rows_of(model: str, scored: Mapping[str, Scored], fingerprint: Fingerprint) -> list[dict[str, Any]]:
    """Measures, differences to the likelihood and certified coverage of every source on `test`."""
    fit, held_out, test = scored["temperature"], scored["certification"], scored["test"]
    hashes = {"template_hash": fingerprint.template_hash, "weights_hash": fingerprint.weights_hash}
    calibrated, claims = {}, {}
    for name in test.scores:
        calibrator = fit_calibrator(
            "platt", fit.scores[name].values, fit.correct, ids=sample_ids(fit.ids), replicates=0, **hashes
        )
        calibrated[name] = calibrator.apply(test.scores[name].values)
        claims[name] = coverage(calibrator.apply(held_out.scores[name].values), held_out, calibrated[name], test)
    raw = {name: one.values for name, one in test.scores.items()}
    rows = []
    for name in test.scores:
        row = {"model": model, "n": len(test.answers), "accuracy": float(test.correct.mean())}
        row |= row_of(name, test, calibrated[name]) | claims[name]
        row["ece_null"] = ece_null(state_of(torch.from_numpy(calibrated[name]), torch.from_numpy(test.correct)))
        if name != "likelihood":
            row["difference_raw"] = difference(test, raw, name)
            row["difference_calibrated"] = difference(test, calibrated, name)
        rows.append(row)
    return rows


def coverage(q: Any, held_out: Scored, on_test: Any, test: Scored) -> dict[str, float]:
    """Share of the test questions answered at thresholds certified on other answers, and the risk there; 0 without one."""
    found = {}
    for risk in RISKS:
        made = certify(q, held_out.correct, risk, DELTA).certificate
        given = np.zeros(len(on_test), dtype=bool) if made is None else on_test >= made.threshold
        found[f"coverage_at_{risk:g}"] = float(given.mean())
        found[f"risk_at_{risk:g}"] = float((~test.correct[given]).mean()) if given.any() else float("nan")
    return found


def summary(rows: Sequence[Mapping[str, Any]], settings: argparse.Namespace) -> dict[str, Any]:
    """Of the last model (the fine-tuned one, where given), and of each by name. Best: highest AUROC on `test`."""
    found: dict[str, Any] = {"samples_per_question": SAMPLES, "seed": settings.seed, "fit_questions": settings.fit}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["source"]: row for row in rows if row["model"] == model}
        best = max(own.values(), key=lambda row: row["auroc_raw"])
        calibrated = min(own.values(), key=lambda row: row["ece15_calibrated"])
        one = {
            "auroc_likelihood": own["likelihood"]["auroc_raw"],
            "auroc_best": best["auroc_raw"],
            "best": best["source"],
            "auroc_gain": best.get("difference_raw", {}).get("auroc"),
            "ece_best_calibrated": best["ece15_calibrated"],
            "ece_debiased_best_calibrated": best["ece_debiased_calibrated"],
            "ece_lowest_calibrated": [calibrated["source"], calibrated["ece15_calibrated"]],
            "ece_null": best["ece_null"],
        }
        found |= one | {model: one}
    return found


SHOWN = ("source", "auroc_raw", "aurc_raw", "ece15_raw", "ece15_calibrated", "ece_debiased_calibrated", "brier_raw")
SHOWN += ("brier_calibrated", "coverage_at_0.1", "coverage_at_0.2", "forward_passes", "tokens", "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--model", type=Path, help="also a fine-tuned Hugging Face directory")
    parser.add_argument("--config", default="demo", help="whose cities, template and training questions are meant")
    parser.add_argument("--work", type=Path, default=Path("confidence-work"), help="answers and scores, to go on from")
    parser.add_argument("--skip-raw", action="store_true", help="only the fine-tuned model")
    parser.add_argument("--sources", default=",".join(SOURCES), help="beside the likelihoods, probes and ensembles")
    parser.add_argument("--questions", type=int, default=1000, help="of the test split")
    parser.add_argument("--fit", type=int, default=3000, help="training questions that fit the probes")
    parser.add_argument("--ensemble", type=int, default=512, help="questions that fit the ensembles")
    parser.add_argument("--calibrate", type=int, default=512, help="questions that calibrate")
    parser.add_argument("--certify", type=int, default=600, help="questions that certify")
    parser.add_argument("--layers", type=int, default=4, help="layers that a probe may choose from")
    parser.add_argument("--seed", type=int, default=0, help="of samples, probes and ensembles")
    settings = parser.parse_args()
    settings.sources = tuple(dict.fromkeys([*LIKELIHOODS, *settings.sources.split(",")]))
    models = ([] if settings.skip_raw else [("raw", None)]) + ([("tuned", settings.model)] if settings.model else [])
    if not models:
        raise SystemExit("--skip-raw leaves no model: give --model")
    rows: list[dict[str, Any]] = []
    for name, model in models:
        own = measure(name, model, settings.config, settings)
        print_table(f"{name}: {own[0]['n']} questions, accuracy {own[0]['accuracy']:.3f}", [
            {key: row[key] for key in SHOWN} for row in own
        ])  # fmt: skip
        rows += own
    found = summary(rows, settings)
    print(found)
    if settings.json:
        write_json(settings.json, rows, found)


if __name__ == "__main__":
    main()

"""Every source of confidence on held-out questions: ranking, calibration, certified coverage, cost.

    python benchmarks/confidence_sources.py --json sources.json --model out/model --config out/config.yaml

The raw model (few-shot) and, with --model, a fine-tuned one answer questions of the config's data, drawn at random from as
deep into each split (--depth): the splits differ in nothing but chance. `train` fits the probes (what the fine-tuned
model learned from is left out), `temperature` the ensembles and each source's calibrator (Platt's two numbers; for an
ensemble on scores by ensembles fitted without the answer), `certification` the thresholds; `test` is measured and used
for nothing else.

Two tables: `all`, every source on the same --questions; and `cheap`, sources of at most one more pass, on more of every
split. ECE has 15 bins; `ece_null` is what a perfectly calibrated source would show by chance, the debiased ECE is without
it. Answers and scores lie in --work as they are made: the same command goes on there, also after --minutes have ended it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import print_table, write_json

from calibtrain.abstention.certificate import certify
from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.intervals import bootstrap, paired_bootstrap, sample_ids
from calibtrain.calibration.metrics import brier, ece_debiased, ece_null
from calibtrain.calibration.ranking import aurc, auroc
from calibtrain.calibration.state import state_of
from calibtrain.confidence.ensemble import cross_scores, fit_ensemble
from calibtrain.confidence.features import POSITIONS, Features, Fingerprint, collect_features, default_layers, depth_of
from calibtrain.confidence.probe import KINDS, Probe, fit_probe
from calibtrain.confidence.sampling import SAMPLES
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.confidence.sources import FAMILIES, SOURCES, cost_of
from calibtrain.config_file import load_config
from calibtrain.data.drops import DropReport
from calibtrain.data.sources import load_records
from calibtrain.data.splits import SHARES, split_of, unique_records
from calibtrain.distributed import World
from calibtrain.models.loading import local_path
from calibtrain.pipeline.calibrate import weights_hash
from calibtrain.pipeline.confidence import Scored, row_of, score_split
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Record, unit_hash

LIKELIHOODS = next(iter(FAMILIES))
RISKS, DELTA = (0.1, 0.2), 0.05
PROBES = {"question_last": "p_ik", "answer_last": "probe_answer_last", "answer_mean": "probe_answer_mean"}
"""Probes by position; that of the question's last token knows no answer: P(IK), which can route before generation."""
REPLICATES = 400
BLOCK = 256
"""Questions that are answered and scored before the clock is looked at."""


class NotDone(Exception):
    """The minutes are over."""


@dataclass(frozen=True)
class Sizes:
    """Questions of each split for the cheap sources, and the first so many of them for all sources."""

    cheap: Mapping[str, int]
    every: Mapping[str, int]


def measure(name: str, model: Path | None, config_path: str, settings: argparse.Namespace) -> dict[str, list[Any]]:
    """The rows of both tables for one model."""
    config = load_config(config_path)
    prepared, loaded = prepare(config), Loaded(config, model)
    shots = tuple(prepared.shots) if model is None else ()
    folder = Path(local_path(config.model.source)) if model is None else model
    fingerprint = Fingerprint(weights_hash(folder), loaded.template.hash)
    asker = Asker(loaded.model, loaded.template, config.evaluation, shots, loaded.device, settings.seed)
    learned = {record.id for record in prepared.splits["train"]} | {record.id for record in prepared.shots}
    records = drawn(config, learned, settings)
    work = settings.work / name
    cheap, features = {}, {}
    for split, asked in records.items():
        cheap[split] = score_blocks(asker, asked, work / split, LIKELIHOODS, fingerprint, settings.deadline)
        texts = [answer.said for answer in cheap[split].answers]
        # Without examples before the question: a probe learns what it needs, and a pass costs a tenth.
        features[split] = collect_features(
            loaded.model,
            loaded.template,
            asked,
            texts,
            work / "features" / f"{split}-{len(asked)}",
            layers=default_layers(depth_of(loaded.model), settings.layers),
            depth=depth_of(loaded.model),
            fingerprint=fingerprint,
            world=World(0, 1, 0, loaded.device),
            on_shard=lambda _: in_time(settings.deadline),
        )
    add_probes(cheap, features, work / "probes", fingerprint, settings.seed)
    every = {}
    for split, count in settings.sizes.every.items():
        names = settings.sources
        asked = records[split][:count]
        scored = score_blocks(asker, asked, work / split, names, fingerprint, settings.deadline)
        first = {one: part(cheap[split], count).scores[one] for one in [*PROBES.values(), "probe"]}
        every[split] = Scored(scored.answers, {**scored.scores, **first})
    probes = tuple(PROBES.values())
    add_ensemble("ensemble_cheap", (*LIKELIHOODS, *probes), every, fingerprint, settings.seed)
    add_ensemble("ensemble", (*settings.sources, *probes), every, fingerprint, settings.seed)
    add_ensemble("ensemble_cheap", (*LIKELIHOODS, *probes), cheap, fingerprint, settings.seed)
    return {
        "all": rows_of(name, every, fingerprint),
        "cheap": rows_of(name, cheap, fingerprint),
    }


def drawn(config: Any, learned: set[str], settings: argparse.Namespace) -> dict[str, list[Record]]:
    """Records of each split: at random among the first `depth` of its questions in draw order."""
    pools: dict[str, list[Record]] = {split: [] for split in SHARES}
    for record in unique_records(load_records(config.data.source, config.seed), DropReport()):
        pools[split_of(record.id, config.seed)].append(record)
    found = {}
    for split, count in settings.sizes.cheap.items():
        reach = pools[split][: round(settings.depth * len(pools[split]))]
        free = [record for record in reach if record.id not in learned]
        if len(free) < count:
            raise SystemExit(f"{split}: {count} questions asked for, {len(free)} there at --depth {settings.depth}")
        found[split] = sorted(free, key=lambda record: unit_hash("sources", settings.seed, record.id))[:count]
    return found


def in_time(deadline: float) -> None:
    """Raise NotDone once the minutes are over."""
    if time.monotonic() > deadline:
        raise NotDone


def score_blocks(
    asker: Asker,
    records: Sequence[Record],
    folder: Path,
    names: Sequence[str],
    fingerprint: Fingerprint,
    deadline: float,
) -> Scored:
    """`score_split` block by block."""
    blocks = []
    for start in range(0, len(records), BLOCK):
        block = records[start : start + BLOCK]
        for members in FAMILIES:
            if set(members) & set(names):
                score_split(asker, block, folder, [*LIKELIHOODS, *members], fingerprint)
                in_time(deadline)
        blocks.append(score_split(asker, block, folder, names, fingerprint))
        print(f"{folder}: {start + len(block)} of {len(records)}, {len(names)} sources", flush=True)
    return joined(blocks)


def joined(blocks: Sequence[Scored]) -> Scored:
    """Blocks as one."""
    scores = {}
    for name, first in blocks[0].scores.items():
        parts = [block.scores[name] for block in blocks]
        failed = None if first.failed is None else np.concatenate([one.failed for one in parts])
        cost = Cost(
            np.concatenate([one.cost.forward_passes for one in parts]),
            np.concatenate([one.cost.tokens for one in parts]),
        )
        scores[name] = SourceScores(np.concatenate([one.values for one in parts]), cost, first.probability, failed)
    return Scored([answer for block in blocks for answer in block.answers], scores)


def part(scored: Scored, count: int) -> Scored:
    """The first `count` answers."""
    scores = {
        name: SourceScores(
            one.values[:count],
            Cost(one.cost.forward_passes[:count], one.cost.tokens[:count]),
            one.probability,
            None if one.failed is None else one.failed[:count],
        )
        for name, one in scored.scores.items()
    }
    return Scored(scored.answers[:count], scores)


def add_probes(
    scored: Mapping[str, Scored], features: Mapping[str, Features], folder: Path, fingerprint: Fingerprint, seed: int
) -> None:
    """A probe for each position, linear or MLP, fitted on `train`; `probe` is the one that its choosing part likes best."""
    fitted: dict[str, Probe] = {}
    fit = scored["train"]
    for position in POSITIONS:
        kinds = []
        for kind in KINDS:
            own = folder / f"{position}-{kind}-{len(fit.answers)}"
            if not (own / "probe.json").is_file():
                made = fit_probe(features["train"], fit.correct, fit.ids, kind=kind, positions=(position,), seed=seed)
                made.save(own)
            kinds.append(Probe.load(own, fingerprint))
        fitted[position] = min(kinds, key=_loss)
    best = min(POSITIONS, key=lambda position: _loss(fitted[position]))
    print({position: (one.kind, one.layer, round(_loss(one), 4)) for position, one in fitted.items()}, flush=True)
    for split, one in scored.items():
        if split != "train":
            cost = Cost(np.ones(len(one.answers)), features[split].tokens.astype(np.float64))
            for position, name in PROBES.items():
                one.scores[name] = SourceScores(fitted[position].score(features[split]), cost, True)
            one.scores["probe"] = one.scores[PROBES[best]]


def _loss(probe: Probe) -> float:
    return probe.candidates[0].log_loss


def add_ensemble(
    title: str, names: Sequence[str], scored: Mapping[str, Scored], fingerprint: Fingerprint, seed: int
) -> None:
    """An ensemble fitted on `temperature`, where its scores are by ensembles fitted without the answer."""
    fit = scored["temperature"]
    known = {name: fit.scores[name].values for name in names}
    made = fit_ensemble(known, fit.correct, fingerprint, sources=names, seed=seed)
    for split, one in scored.items():
        if split == "temperature":
            values = cross_scores(known, fit.correct, fingerprint, sources=names, seed=seed)
        elif split != "train":
            values = made.score({name: one.scores[name].values for name in names})
        else:
            continue
        one.scores[title] = SourceScores(values, cost_of({name: one.scores[name] for name in names}), True)


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
        row |= {"n_calibrate": len(fit.answers), "n_certify": len(held_out.answers)}
        row |= row_of(name, test, calibrated[name]) | claims[name]
        row["ece_null"] = ece_null(state_of(torch.from_numpy(calibrated[name]), torch.from_numpy(test.correct)))
        row["ece_debiased_interval"] = debiased(calibrated[name], test)
        if name != "likelihood":
            row["difference_raw"] = difference(
                lambda state: {"auroc": auroc(state), "aurc": aurc(state)}, test, raw, name
            )
            row["difference_calibrated"] = difference(lambda state: {"brier": brier(state)}, test, calibrated, name)
        rows.append(row)
    return rows


def difference(metrics: Any, test: Scored, values: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """[estimate, low, high] of each metric of one source minus the likelihood's, by the paired bootstrap."""
    y = test.correct.astype(np.float64)
    found = paired_bootstrap(
        metrics, (values["likelihood"], y), (values[name], y), sample_ids(test.ids), replicates=REPLICATES
    )
    return {key: [one.estimate, one.low, one.high] for key, one in found.items()}


def debiased(q: Any, test: Scored) -> list[float]:
    """95% interval of the debiased ECE."""
    found = bootstrap(
        lambda state: {"ece_debiased": ece_debiased(state)},
        q,
        test.correct.astype(np.float64),
        sample_ids(test.ids),
        replicates=REPLICATES,
    )
    return [found["ece_debiased"].low, found["ece_debiased"].high]


def coverage(q: Any, held_out: Scored, on_test: Any, test: Scored) -> dict[str, float]:
    """Share of the test questions answered at thresholds certified on other answers, and the risk there; 0 without one."""
    found = {}
    for risk in RISKS:
        made = certify(q, held_out.correct, risk, DELTA).certificate
        given = np.zeros(len(on_test), dtype=bool) if made is None else on_test >= made.threshold
        found[f"coverage_at_{risk:g}"] = float(given.mean())
        found[f"risk_at_{risk:g}"] = float((~test.correct[given]).mean()) if given.any() else float("nan")
    return found


def summary(tables: Mapping[str, Sequence[Mapping[str, Any]]], settings: argparse.Namespace) -> dict[str, Any]:
    """Of the last model (the fine-tuned one, where given), and of each by name. Best: highest AUROC on `test`."""
    found: dict[str, Any] = {"samples_per_question": SAMPLES, "seed": settings.seed, "depth": settings.depth}
    found["questions"] = {"cheap": dict(settings.sizes.cheap), "all": dict(settings.sizes.every)}
    for model in dict.fromkeys(row["model"] for row in tables["all"]):
        one = {
            table: _summary({row["source"]: row for row in rows if row["model"] == model})
            for table, rows in tables.items()
        }
        found |= one["all"] | {model: one}
    return found


def _summary(own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    best = max(own.values(), key=lambda row: row["auroc_raw"])
    calibrated = min(own.values(), key=lambda row: row["ece15_calibrated"])
    return {
        "n": best["n"],
        "auroc_likelihood": own["likelihood"]["auroc_raw"],
        "auroc_best": best["auroc_raw"],
        "best": best["source"],
        "auroc_gain": best.get("difference_raw", {}).get("auroc"),
        "ece_best_calibrated": best["ece15_calibrated"],
        "ece_debiased_best_calibrated": best["ece_debiased_calibrated"],
        "ece_debiased_interval": best["ece_debiased_interval"],
        "ece_lowest_calibrated": [calibrated["source"], calibrated["ece15_calibrated"]],
        "ece_null": best["ece_null"],
    }


SHOWN = ("source", "auroc_raw", "aurc_raw", "ece15_raw", "ece15_calibrated", "ece_debiased_calibrated", "brier_raw")
SHOWN += ("brier_calibrated", "coverage_at_0.1", "coverage_at_0.2", "forward_passes", "tokens", "failed")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--model", type=Path, help="also a fine-tuned Hugging Face directory")
    parser.add_argument("--config", default="demo", help="whose cities, template and training questions are meant")
    parser.add_argument("--work", type=Path, default=Path("confidence-work"), help="answers and scores, to go on from")
    parser.add_argument("--skip-raw", action="store_true", help="only the fine-tuned model")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then (exit code 75); again goes on")
    parser.add_argument("--sources", default=",".join(SOURCES), help="beside the likelihoods, probes and ensembles")
    parser.add_argument("--questions", type=int, default=1000, help="of the test split, to all sources")
    parser.add_argument("--few", type=int, default=320, help="of temperature and certification, to all sources")
    parser.add_argument("--many", type=int, default=3000, help="of the test split, to the cheap sources")
    parser.add_argument(
        "--calibrate", type=int, default=1000, help="of temperature and certification, to cheap sources"
    )
    parser.add_argument("--fit", type=int, default=4600, help="training questions that fit the probes")
    parser.add_argument("--depth", type=float, default=0.7, help="share of each split's questions to draw from")
    parser.add_argument("--layers", type=int, default=5, help="layers that a probe may choose from")
    parser.add_argument("--seed", type=int, default=0, help="of samples, probes and ensembles")
    settings = parser.parse_args()
    settings.sources = tuple(dict.fromkeys([*LIKELIHOODS, *settings.sources.split(",")]))
    settings.deadline = time.monotonic() + 60 * settings.minutes
    few, calibrate = settings.few, settings.calibrate
    settings.sizes = Sizes(
        {"train": settings.fit, "temperature": calibrate, "certification": calibrate, "test": settings.many},
        {"temperature": few, "certification": few, "test": settings.questions},
    )
    return settings


def main() -> None:
    settings = arguments()
    models = ([] if settings.skip_raw else [("raw", None)]) + ([("tuned", settings.model)] if settings.model else [])
    if not models:
        raise SystemExit("--skip-raw leaves no model: give --model")
    tables: dict[str, list[dict[str, Any]]] = {"all": [], "cheap": []}
    for name, model in models:
        try:
            own = measure(name, model, settings.config, settings)
        except NotDone:
            print("the minutes are over; the same command goes on")
            raise SystemExit(75) from None
        for table, rows in own.items():
            title = f"{name}, {table}: {rows[0]['n']} questions, accuracy {rows[0]['accuracy']:.3f}"
            print_table(title, [{key: row[key] for key in SHOWN} for row in rows])
            tables[table] += [{"table": table, **row} for row in rows]
    found = summary(tables, settings)
    print(found)
    if settings.json:
        write_json(settings.json, [row for rows in tables.values() for row in rows], found)


if __name__ == "__main__":
    main()

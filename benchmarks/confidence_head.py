"""What a confidence head buys on a finished run, by the number of graded answers that it is solved on.

    python benchmarks/confidence_head.py out --fresh 1500 --json confidence_head.json

The run's model answers its calibration split and, with --fresh, as many training questions that are in no split of the run:
heads are solved on the first N of these, mixed. `temperature` fits Platt's two numbers to head and likelihood alike,
`certification` certifies both at the config's target risk, `test` is measured. Differences of AUROC come with paired
bootstrap intervals. The answers' states lie in --work, so that the same command does not answer again.

With --foreign the same heads, with the same Platt maps, also meet questions unlike those: other facts, and the test
questions in other words and languages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import print_table, write_json
from numpy.typing import NDArray

from calibtrain.abstention.certificate import certify
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import paired_bootstrap, sample_ids
from calibtrain.calibration.metrics import brier, ece_debiased
from calibtrain.calibration.ranking import aurc, auroc
from calibtrain.calibration.scores import sigmoid
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.features import Fingerprint, default_layers, depth_of
from calibtrain.confidence.head import FittedHead, HeadInputs, fit_head
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Message, Record

Array = NDArray[np.float64]
USES = ("temperature", "certification", "test")


class Answers:
    """A split's answers: what a head reads of them, their grades and questions."""

    def __init__(self, inputs: HeadInputs, correct: NDArray[np.bool_], ids: list[str]) -> None:
        self.inputs, self.correct, self.ids = inputs, correct, ids

    def take(self, rows: Sequence[int]) -> Answers:
        """Those at `rows`."""
        one, where = self.inputs, np.asarray(rows)
        return Answers(
            HeadInputs(one.logprob[where], one.readings[where], one.states[where]),
            self.correct[where],
            [self.ids[row] for row in rows],
        )


def answered(loaded: Loaded, records: Sequence[Record], layers: tuple[int, ...], path: Path) -> Answers:
    """The model's answers to `records`, kept at `path`."""
    ids = [record.id for record in records]
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            if kept["ids"].tolist() == ids and tuple(kept["layers"].tolist()) == layers:
                inputs = HeadInputs(kept["logprob"], kept["readings"], kept["states"].astype(np.float32))
                return Answers(inputs, kept["correct"], ids)
    start = time.perf_counter()
    found = loaded.answer(records, layers=layers)
    print(f"{path.stem}: {len(records)} answers, {time.perf_counter() - start:.0f} s", flush=True)
    inputs, correct = HeadInputs.of(found), np.array([bool(one.correct) for one in found.answers])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        ids=np.array(ids),
        layers=np.array(layers),
        correct=correct,
        logprob=inputs.logprob,
        readings=inputs.readings,
        states=inputs.states.astype(np.float16),
    )
    return Answers(inputs, correct, ids)


def row(
    name: str, n: int, scores: dict[str, Array], given: dict[str, Answers], risk: float, delta: float
) -> dict[str, Any]:
    """One source: fitted on `temperature`, certified on `certification`, measured on `test`."""
    calibrated = {use: platt(scores["temperature"], given["temperature"]).apply(scores[use]) for use in USES[1:]}
    test, certificate = given["test"], None
    found = certify(calibrated["certification"], given["certification"].correct, risk, delta)
    certificate = found.certificate
    state = state_of(torch.from_numpy(calibrated["test"]), torch.from_numpy(test.correct))
    threshold = np.inf if certificate is None else certificate.threshold
    kept = calibrated["test"] >= threshold
    return {
        "source": name,
        "graded": n,
        "accuracy": float(test.correct.mean()),
        "auroc": auroc(state),
        "aurc": aurc(state),
        "brier": brier(state),
        "ece_debiased": ece_debiased(state),
        "certified": 0.0 if certificate is None else certificate.coverage,
        "coverage": float(kept.mean()),
        "risk": float((~test.correct[kept]).mean()) if kept.any() else float("nan"),
    }


def foreign(config: RunConfig, test: Sequence[Record]) -> dict[str, list[Record]]:
    """Questions with accepted answers, by family."""
    from forgetting import other_facts
    from outside import CITY, LANGUAGES, WORDINGS

    start, end = CITY.split("{}")

    def reworded(forms: Sequence[str], records: Sequence[Record]) -> list[Record]:
        names = [one.question.removeprefix(start).removesuffix(end) for one in records]
        asked = [forms[i % len(forms)].format(name) for i, name in enumerate(names)]
        return [replace(one, prompt=(Message("user", text),)) for one, text in zip(records, asked, strict=True)]

    return {
        **other_facts(),
        "other words": reworded(WORDINGS, test[:400]),
        "another language": reworded(LANGUAGES, test[400:700]),
    }


def foreign_row(name: str, family: str, score: Array, fitted: Calibrator, given: Answers) -> dict[str, Any]:
    """How a source does on a family that it was not calibrated on."""
    told = fitted.apply(score)
    state = state_of(torch.from_numpy(told), torch.from_numpy(given.correct))
    return {
        "family": family,
        "source": name,
        "n": len(given.ids),
        "accuracy": float(given.correct.mean()),
        "confidence": float(told.mean()),
        "auroc": auroc(state),
        "brier": brier(state),
    }


def platt(score: Array, given: Answers) -> Calibrator:
    """Platt's map of a score in [0, 1]."""
    return fit_calibrator("platt", score, given.correct, ids=sample_ids(given.ids), template_hash="", weights_hash="")


def difference(before: Array, after: Array, given: Answers) -> tuple[float, float, float]:
    """AUROC of `after` less that of `before`, with its paired interval."""
    grades = given.correct.astype(np.float64)

    def metrics(state: CalibrationState) -> dict[str, float]:
        return {"auroc": auroc(state)}

    found = paired_bootstrap(metrics, (before, grades), (after, grades), sample_ids(given.ids))["auroc"]
    return found.estimate, found.low, found.high


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--fresh", type=int, default=0, help="training questions answered beside the calibration split")
    parser.add_argument("--numbers", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument(
        "--layers", type=int, nargs="+", help="hidden states that heads read; default: four, evenly spread"
    )
    parser.add_argument("--work", type=Path, default=Path("confidence_head_work"))
    parser.add_argument("--foreign", action="store_true", help="ask questions unlike the run's as well")
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.run / "config.yaml")
    prepared, loaded = prepare(config), Loaded(config, arguments.run / "model")
    layers = tuple(arguments.layers or default_layers(depth_of(loaded.model), 4))
    own = {record.id for records in prepared.splits.values() for record in records}
    more = config.data.splits.train + arguments.fresh
    wider = (
        prepare(load_config(arguments.run / "config.yaml", [f"data.splits.train={more}"])) if arguments.fresh else None
    )
    fresh = [] if wider is None else [record for record in wider.splits["train"] if record.id not in own]
    work = arguments.work
    given = {use: answered(loaded, prepared.splits[use], layers, work / f"{use}.npz") for use in USES}
    pool = answered(loaded, [*prepared.splits["calibration"], *fresh], layers, work / "pool.npz")
    order = np.random.default_rng(0).permutation(len(pool.ids)).tolist()
    risk, delta = config.abstention.target_risk, config.abstention.delta
    likelihood = {use: np.exp(one.inputs.logprob) for use, one in given.items()}
    rows = [row("likelihood", 0, likelihood, given, risk, delta)]
    others = foreign(config, prepared.splits["test"]) if arguments.foreign else {}
    strangers = {name: answered(loaded, asked, layers, work / f"{name}.npz") for name, asked in others.items()}
    plainly = platt(likelihood["temperature"], given["temperature"])
    elsewhere = [
        foreign_row("likelihood", name, np.exp(one.inputs.logprob), plainly, one) for name, one in strangers.items()
    ]
    belongs_to = Fingerprint(weights_hash(arguments.run / "model"), loaded.template.hash)
    for number in [one for one in arguments.numbers if one < len(order)] + [len(order)]:
        some, start = pool.take(order[:number]), time.perf_counter()
        head: FittedHead
        head, _ = fit_head(some.inputs, some.correct, layers, belongs_to, seed=config.seed)
        scores = {use: np.asarray(sigmoid(head.logit(one.inputs))) for use, one in given.items()}
        found = row("head", number, scores, given, risk, delta)
        low_high = difference(likelihood["test"], scores["test"], given["test"])
        found |= {"left_to_likelihood": float(head.foreign(given["test"].inputs).mean())}
        found |= dict(zip(("auroc_gain", "low", "high"), low_high, strict=True))
        rows.append(found | {"seconds": time.perf_counter() - start})
        fitted = platt(scores["temperature"], given["temperature"])
        for family, one in strangers.items():
            told = np.asarray(sigmoid(head.logit(one.inputs)))
            found = foreign_row(f"head, {number}", family, told, fitted, one)
            elsewhere.append(found | {"left_to_likelihood": float(head.foreign(one.inputs).mean())})
    names = list(rows[-1])
    rows = [{name: one.get(name, float("nan")) for name in names} for one in rows]
    print_table(f"{arguments.run.name}: {len(given['test'].ids)} test questions, target risk {risk:g}", rows)
    elsewhere = [{"left_to_likelihood": float("nan"), **one} for one in elsewhere]
    elsewhere.sort(key=lambda one: str(one["family"]))
    if elsewhere:
        print_table("Questions unlike the run's", elsewhere)
    if arguments.json:
        plain, best = rows[0], rows[-1]
        summary = {f"{key}_{name}": one[key] for name, one in (("plain", plain), ("head", best)) for key in
                   ("auroc", "coverage", "ece_debiased")}  # fmt: skip
        write_json(arguments.json, [*rows, *elsewhere], {**summary, "graded": best["graded"]})


if __name__ == "__main__":
    main()

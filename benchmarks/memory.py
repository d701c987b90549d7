"""Memory of one rank while a model is sampled from, loaded, trained, exported and evaluated under ZeRO-3.

python benchmarks/memory.py [--before CHECKOUT] [--ranks 1 2 4] [--layers 16 --width 1024] [--json PATH]

A random model in bf16 goes through `calibtrain train` (ORPO, of which every rank first samples wrong answers from the
starting model) and `calibtrain evaluate` on 1, 2 and 4 gloo ranks of this machine, where device and host memory are one.
Each phase's peak is a rank's resident memory above what its libraries took, as the kernel counts it: `peak` of all pages,
`own` of those that are no file's (weights that are read whole in their own dtype stay mapped from the file). --before: a
checkout of an earlier version, measured beside this one; it evaluates in one process. A line a + b/N is fitted to each
phase's peak, in units of the model's bytes. Summary: `model_bytes`, `fits`, `counted` (bytes that a rank of 8B and 70B
models holds). Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("sampling", "loading", "training", "exporting", "evaluating")
MIB = 2**20
SAMPLE_SECONDS = 0.02
HELD = {"sampling": 2.0, "loading": 2.0, "training": 18.0, "exporting": 14.0, "evaluating": 2.0}
"""Bytes a parameter that all ranks hold between them, bf16 with AdamW: weights (2); fp32 masters (4) and moments (8), which
are there from the first step on; fp32 gradients (4)."""
LARGE = {"8B": (8.0e9, 128256 * 4096, 0.22e9), "70B": (70.6e9, 128256 * 8192, 0.86e9)}
"""Parameters, those of the embeddings and those of a layer, of Llama 3."""


DEFAULTS = {
    "reduce_bucket_size": 10_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""Of ZeRO-3, in parameters."""


class Watch:
    """Peaks of this process's memory, in bytes above `base`, by phase."""

    def __init__(self) -> None:
        self.base = _status("VmRSS")
        self.own_base = _status("RssAnon")
        self.peaks: dict[str, dict[str, int]] = {}
        self._own = 0
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, memory counts as that of `name`."""
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        self._own = 0
        yield
        found = {"peak": _status("VmHWM") - self.base, "own": max(self._own, _status("RssAnon")) - self.own_base}
        before = self.peaks.get(name, found)
        self.peaks[name] = {key: max(value, before[key]) for key, value in found.items()}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, as a phase."""

        def watched(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return call(*args, **options)

        return watched

    def _look(self) -> None:
        while True:
            self._own = max(self._own, _status("RssAnon"))
            time.sleep(SAMPLE_SECONDS)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def import_libraries() -> None:
    """What a phase would import, and the process group: memory that no model takes."""
    import deepspeed
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from calibtrain.distributed import start_world

    world = start_world()
    layer = torch.nn.Linear(8, 8)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=layer, config=settings, dist_init_required=False)
    engine(torch.zeros(1, 8, device=world.device))
    engine.destroy()


def rank_trains(config_path: str, folder: Path) -> None:
    """One rank of a training run; writes FOLDER/train-<rank>.json."""
    from calibtrain.config_file import load_config
    from calibtrain.distributed import leave_world
    from calibtrain.pipeline import train
    from calibtrain.training.trainer import Trainer

    import_libraries()
    watch = Watch()
    build, start = train.build_model, train.start_engine
    train._add_rejected = watch.around("sampling", train._add_rejected)
    train.build_model = watch.around("loading", build)
    train.start_engine = watch.around("loading", start)
    Trainer.fit = watch.around("training", Trainer.fit)  # type: ignore[method-assign]
    train.export_run = watch.around("exporting", train.export_run)
    train.run(load_config(config_path))
    (folder / f"train-{os.environ['RANK']}.json").write_text(json.dumps(watch.peaks))
    leave_world()


def rank_evaluates(config_path: str, folder: Path) -> None:
    """One process that answers; writes FOLDER/evaluate-<rank>.json."""
    from calibtrain.config_file import load_config
    from calibtrain.pipeline import evaluate

    config = load_config(config_path)
    model = config.output_dir / "model"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    import_libraries()
    watch = Watch()
    with watch.phase("evaluating"):
        if ranks == 1:
            evaluate.run(config, model=model, split="test", output=None)
        else:
            from calibtrain.pipeline.team import joined

            with joined() as team:
                if team.world.is_main:
                    evaluate.run(config, model=model, split="test", output=None)
                else:
                    team.work()
    (folder / f"evaluate-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(watch.peaks))


def write_model(folder: Path, layers: int, width: int) -> int:
    """A random Llama in bf16 with the test suite's tokenizer. Returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_tokenizer

    settings = LlamaConfig(
        vocab_size=16384, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(settings)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return sum(one.numel() * one.element_size() for one in model.parameters())


def write_job(folder: Path, model: Path, name: str, parameters: int) -> Path:
    """A short run under ZeRO-3, whose thresholds are to the model as DeepSpeed's defaults are to one of 8B."""
    import yaml

    rows = [{"question": f"What is {i}?", "answers": [f"{i * 7 % 10}"]} for i in range(40)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = parameters / LARGE["8B"][0]
    zero = folder / "zero.json"
    zero.write_text(
        json.dumps({"zero_optimization": {"stage": 3} | {key: int(x * share) for key, x in DEFAULTS.items()}})
    )
    config = {
        "name": name,
        "output_dir": str(folder / name),
        "model": {"source": str(model), "dtype": "bf16"},
        "data": {
            "source": {"kind": "file", "path": str(folder / "questions.jsonl")},
            "max_length": 48,
            "few_shot_raw": 1,
            "splits": {"train": 8, "calibration": 0, "temperature": 0, "certification": 0, "test": 4},
        },
        "objective": {"name": "orpo"},
        "penalties": [],
        "training": {
            "micro_batch_size": 1, "global_batch_size": 4, "max_steps": 2, "zero_stage": 3, "log_every": 1,
            "deepspeed": str(zero),
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 2},
        "tracking": {"wandb": False},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(
    checkout: Path, ranks: int, model: Path, parameters: int, folder: Path, before: bool
) -> dict[str, dict[str, int]]:
    """The highest peak of any rank in each phase, bytes."""
    folder.mkdir()
    config = write_job(folder, model, "run", parameters)
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "CALIBTRAIN_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false",
        # What is freed goes back to the system at once: what the heap would keep is no part of a peak.
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip

    def launch(count: int, part: str) -> None:
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        argv = [*argv, __file__, part, str(config), str(folder)]
        ended = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{part} on {count} ranks failed:\n{(ended.stdout + ended.stderr)[-4000:]}")

    launch(ranks, "--train")
    launch(1 if before else ranks, "--evaluate")
    found = [json.loads(path.read_text()) for path in folder.glob("*-?.json")]
    return {
        phase: {key: max(one[phase][key] for one in found if phase in one) for key in ("peak", "own")}
        for phase in PHASES
    }


def fit(points: dict[int, float]) -> tuple[float, float]:
    """A and b of the least squares line a + b/N."""
    import numpy as np

    x = np.array([1 / ranks for ranks in points])
    if len(points) < 2:
        return 0.0, float(next(iter(points.values())))
    b, a = np.polyfit(x, np.array(list(points.values())), 1)
    return float(a), float(b)


def counted(ranks: int) -> list[dict[str, Any]]:
    """Bytes of weights and optimiser that a rank of large models holds, and the largest piece that is whole for a moment."""
    rows = []
    for name, (parameters, embeddings, layer) in LARGE.items():
        for phase, held in HELD.items():
            share, whole = held * parameters / ranks, 2 * max(embeddings, layer)
            rows.append(
                {"model": name, "ranks": ranks, "phase": phase, "parts_gib": share / 2**30, "whole_gib": whole / 2**30,
                 "before_gib": (2 * parameters if phase in ("sampling", "loading", "evaluating") else share) / 2**30}
            )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkouts = {"now": ROOT} if options.before is None else {"before": options.before.resolve(), "now": ROOT}
    from _report import print_table, write_json

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_bytes = write_model(folder / "model", options.layers, options.width)
        for version, checkout in checkouts.items():
            for ranks in options.ranks:
                found = measure(
                    checkout,
                    ranks,
                    folder / "model",
                    model_bytes // 2,
                    folder / f"{version}-{ranks}",
                    version == "before",
                )
                rows += [
                    {"version": version, "ranks": ranks, "phase": phase,
                     "peak_mib": one["peak"] / MIB, "own_mib": one["own"] / MIB, "models": one["peak"] / model_bytes}
                    for phase, one in found.items()
                ]  # fmt: skip
                print_table(f"{version}, {ranks} ranks", rows[-len(PHASES) :])
    fits = []
    for version in checkouts:
        for phase in PHASES:
            chosen = {r["ranks"]: r["models"] for r in rows if r["version"] == version and r["phase"] == phase}
            fixed, divided = fit(chosen)
            fits.append({"version": version, "phase": phase, "fixed": fixed, "divided": divided})
    print_table(f"a rank's peak in models of {model_bytes / MIB:.0f} MiB: fixed + divided / ranks", fits)
    large = [row for ranks in (8, 16, 64) for row in counted(ranks)]
    print_table("counted: GiB a rank", large)
    if options.json is not None:
        write_json(options.json, rows, {"model_bytes": model_bytes, "fits": fits, "counted": large})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if sys.argv[1:2] == ["--train"]:
        rank_trains(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--evaluate"]:
        rank_evaluates(sys.argv[2], Path(sys.argv[3]))
    else:
        main()

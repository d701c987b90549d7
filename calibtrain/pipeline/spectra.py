"""`calibtrain spectra`: what training did to every weight matrix, held against chance, written as JSON and as a page."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import weights_hash, write_json
from calibtrain.pipeline.spectra_page import write_page
from calibtrain.spectral.compare import Settings, compare_matrix, judge
from calibtrain.spectral.directories import Pair, Pairs, open_pairs
from calibtrain.spectral.split import check_part, without
from calibtrain.spectral.verdict import findings, summary
from calibtrain.spectral.written_models import write_model

logger = logging.getLogger(__name__)

FORMAT = 1
RESULT, PARTIAL = "spectra.json", "spectra.partial.jsonl"


@dataclass(frozen=True, slots=True)
class Compared:
    """Two model directories, and how the user calls them."""

    base: Path
    tuned: Path
    base_name: str
    tuned_name: str
    home: Path  # where results go unless told otherwise


def sides(base: str, tuned: Path | None) -> Compared:
    """The two directories: BASE and TUNED, or a finished run's start and its export.

    Raises UserError where either is no model directory, or a run has not finished.
    """
    if tuned is not None:
        from calibtrain.models.loading import local_path

        found = Path(local_path(base)) if base.startswith("embedded:") else Path(base).expanduser()
        if not found.is_dir():
            raise UserError(
                f"{base}: no such directory; give a Hugging Face model directory (a model of the hub: download it)"
            )
        return Compared(found, tuned, base, str(tuned), Path("spectra"))
    return _of_run(Path(base))


def _of_run(output_dir: Path) -> Compared:
    from calibtrain.config_file import load_config

    if not (output_dir / "config.yaml").is_file():
        raise UserError(
            f"{output_dir}: not the output_dir of a run (it has no config.yaml); to compare two models give both: "
            "`calibtrain spectra BASE TUNED`"
        )
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: training has not finished (no exported model in {model})")
    source = load_config(output_dir / "config.yaml").model.source
    return Compared(_start_of(output_dir, source), model, source, str(model), output_dir)


def _start_of(output_dir: Path, source: str) -> Path:
    from calibtrain.models.loading import local_path

    start = Path(local_path(source))
    if not start.is_dir():
        raise UserError(
            f"{output_dir}: the run began from {source}, which is not a directory here; download it and give both: "
            f"`calibtrain spectra DIR {output_dir / 'model'}`"
        )
    return start


@contextmanager
def at_step(output_dir: Path, step: int) -> Iterator[Compared]:
    """A run's start and its checkpoint of `step`, as a float32 model directory that is gone afterwards.

    Raises UserError where the run keeps no whole checkpoint of that step.
    """
    from calibtrain.config_file import load_config
    from calibtrain.models.export import restored_model
    from calibtrain.training.checkpoint import complete_checkpoints
    from calibtrain.training.checkpoint_weights import checkpoint_weights

    kept = {int(path.name.removeprefix("step-")): path for path in complete_checkpoints(output_dir / "checkpoints")}
    if step not in kept:
        there = ", ".join(map(str, kept)) or "none (training.checkpoint_every and training.keep_checkpoints keep them)"
        raise UserError(f"--step {step}: {output_dir} has no whole checkpoint of it; there are: {there}")
    config = load_config(output_dir / "config.yaml")
    start = _start_of(output_dir, config.model.source)
    with TemporaryDirectory(dir=output_dir, prefix="spectra-") as folder:
        whole = config.model.model_copy(update={"dtype": "fp32"})
        found = {**_frozen(whole), **checkpoint_weights(kept[step])}
        restored_model(found, whole).save_pretrained(folder)
        name = f"{output_dir}, step {step}"
        yield Compared(start, Path(folder), config.model.source, name, output_dir / f"spectra-step-{step}")


def _frozen(config: ModelConfig) -> dict[str, Tensor]:
    """What a run does not train, by name: checkpoints do not hold it."""
    from calibtrain.models.four_bit import dense
    from calibtrain.models.loading import load_model
    from calibtrain.models.policy import Policy

    if config.lora is None and config.adapter is None:
        return {}
    policy = Policy(load_model(config))
    return {name: dense(weight) for name, weight in policy.named_parameters() if not weight.requires_grad}


def run(
    compared: Compared,
    *,
    output: Path | None = None,
    settings: Settings | None = None,
    layers: set[int] | None = None,
    modules: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare all matrices, write spectra.json and spectra.html to `output`, and return what was written.

    Rows are kept as they are made: the same command after an interruption goes on where it was.
    """
    settings, output = settings or Settings(), output or compared.home
    began = time.perf_counter()
    pairs = open_pairs(compared.base, compared.tuned, layers=layers, modules=modules)
    output.mkdir(parents=True, exist_ok=True)
    kept = _Kept(output / PARTIAL, _key(compared, settings))
    rows = _rows(pairs, settings, kept)
    if not any(row["relative_drift"] for row in rows):
        kept.remove()
        raise UserError(
            f"{compared.base_name} and {compared.tuned_name} hold the same weights in all {len(rows)} matrices: there is no "
            "change to look at; check that the second is what came out of training"
        )
    judge(rows, settings.level)
    total = summary(rows)
    result = {
        "format": FORMAT,
        "base": compared.base_name,
        "tuned": compared.tuned_name,
        "tuned_hash": weights_hash(compared.tuned),
        "settings": {
            **asdict(settings),
            "layers": spelled(layers),
            "modules": None if modules is None else ",".join(modules),
        },
        "matrices": rows,
        "left_out": [{"name": name, "why": why} for name, why in pairs.left_out],
        "summary": total,
        "findings": findings(total, settings.level),
        "seconds": time.perf_counter() - began,
        "peak_gb": _peak_gb(),
    }
    result = without_nan(result)
    write_json(output / RESULT, result)
    write_page(output, result)
    kept.remove()
    return result


def write_without(
    compared: Compared,
    part: str,
    output: Path,
    *,
    random_rotation: int | None = None,
    layers: set[int] | None = None,
    modules: Sequence[str] | None = None,
) -> None:
    """Write TUNED with one part of its change undone in every matrix, as a Hugging Face directory.

    `part` and `random_rotation` are those of `calibtrain.spectral.split.without`. Raises UserError before anything is read
    where they make no sense.
    """
    check_part(part, random_rotation)

    def change(pair: Pair, initial: Tensor, weight: Tensor) -> Tensor:
        key = zlib.crc32(pair.name.encode())
        return without(part, initial, weight, random_rotation=random_rotation, generator_key=key)

    write_model(compared.base, compared.tuned, output, change, layers=layers, modules=modules)


def _rows(pairs: Pairs, settings: Settings, kept: _Kept) -> list[dict[str, Any]]:
    """A row a pair, in order, from several threads: each takes one matrix at a time, and torch gives it one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = 1 if device.type == "cuda" else max(1, torch.get_num_threads())
    before = torch.get_num_threads()

    def one(pair: Pair) -> dict[str, Any]:
        found = kept.rows.get(pair.name)
        if found is None:
            base, tuned = (matrix.to(device) for matrix in pair.read())
            factors = pair.factors()
            moved = None if factors is None else (factors[0].to(device), factors[1].to(device))
            found = compare_matrix(pair.name, base, tuned, settings, moved)
            kept.add(found)
        tick()
        return {"name": pair.name, "layer": pair.layer, "module": pair.module, "expert": pair.expert} | found

    with _progress(len(pairs.pairs)) as tick:
        try:
            pool = ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(1 if workers > 1 else before,)
            )
            with pool:
                futures = [pool.submit(one, pair) for pair in pairs.pairs]
                try:
                    return [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(before)


class _Kept:
    """Rows of an interrupted run, one JSON a line after a line that says what they are of."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.rows = path, dict[str, dict[str, Any]]()
        self._lock = threading.Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and lines[0] == key:
            for line in lines[1:]:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written
                    continue
                self.rows[row["name"]] = row
            logger.info("going on with %d matrices that are done (%s)", len(self.rows), path)
        whole = "".join(json.dumps(row) + "\n" for row in self.rows.values())
        path.write_text(f"{key}\n{whole}", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _key(compared: Compared, settings: Settings) -> str:
    """Both models' files as they lie there, and what is computed of them."""
    files = [
        (side.name, path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for side in (compared.base, compared.tuned)
        for path in sorted(side.glob("*.safetensors"))
    ]
    return json.dumps({"format": FORMAT, "settings": asdict(settings), "files": files})


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    began, done, lock = time.perf_counter(), 0, threading.Lock()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("comparing matrices", total=total)

        def tick() -> None:
            nonlocal done
            with lock:
                done += 1
                bar.update(task, completed=done)
                if not console.is_terminal and done % max(1, total // 5) == 0:
                    left = (time.perf_counter() - began) / done * (total - done)
                    console.print(f"{done} of {total} matrices, {left:.0f} s left", soft_wrap=True)

        yield tick


def _peak_gb() -> float:
    """Most memory this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    return [without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def parse_layers(text: str | None) -> set[int] | None:
    """Layers of a list like 0-5,12."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UserError(f"--layers: {text!r} is not a list of layers like 0-5,12")
        found.update(range(int(first), int(last or first) + 1))
    return found


def spelled(layers: set[int] | None) -> str | None:
    """Such a list of `layers`."""
    if layers is None:
        return None
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_modules(text: str | None) -> list[str] | None:
    """Names of a list like q_proj,o_proj."""
    if text is None:
        return None
    names = [one.strip() for one in text.split(",") if one.strip()]
    if not names:
        raise UserError("--modules: give names of modules, e.g. q_proj,down_proj")
    return names

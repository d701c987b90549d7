"""What a model costs: bytes on disk, memory while it answers, tokens a second; both models alternate in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from calibtrain.pipeline.evaluate import Loaded
from calibtrain.records import Record

QUESTIONS, ROUNDS = 64, 3


def size_on_disk(model: Path) -> int:
    """Bytes of the files of a Hugging Face directory."""
    return sum(file.stat().st_size for file in model.rglob("*") if file.is_file())


def held_bytes(loaded: Loaded) -> int:
    """Bytes of the parameters and buffers as they lie in memory, tied ones once."""
    tensors = {one.data_ptr(): one for one in (*loaded.model.parameters(), *loaded.model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


class Memory:
    """Peak memory from here on, above what is in use: of the device on CUDA, else of the process (Linux; None elsewhere)."""

    def __init__(self) -> None:
        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start: int | None = torch.cuda.memory_allocated()
        else:
            self.start = _process("VmRSS") if _reset_peak() else None

    def peak(self) -> int | None:
        """Bytes."""
        found = torch.cuda.max_memory_allocated() if self.cuda else _process("VmHWM")
        return None if found is None or self.start is None else max(0, found - self.start)


def has_room(model: Path) -> bool:
    """Whether the weights of another model fit beside what is in memory; where that cannot be told, they do."""
    needed = 1.5 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] > needed
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(one.split()[1]) for one in lines if one.startswith("MemAvailable:")) * 1024 > needed
    except (OSError, StopIteration):
        return True


def speeds(models: Sequence[Loaded], records: Sequence[Record]) -> list[float]:
    """Tokens of answers a second of each model, the median of rounds in which the models take turns."""
    questions = list(records)[:QUESTIONS]
    found: list[list[float]] = [[] for _ in models]
    for turn in range(ROUNDS + 1):
        for place, loaded in enumerate(models):
            begun = time.perf_counter()
            answers = loaded.answer(questions).answers
            if turn:  # the first warms up
                tokens = sum(len(one.token_logprobs) for one in answers)
                found[place].append(tokens / (time.perf_counter() - begun))
    return [sorted(one)[len(one) // 2] for one in found]


def cost(path: Path, loaded: Loaded, peak: int | None) -> dict[str, Any]:
    """Plain values of one model, without its speed."""
    return {"disk_bytes": size_on_disk(path), "held_bytes": held_bytes(loaded), "peak_bytes": peak}


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _process(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    line = next((one for one in lines if one.startswith(f"{key}:")), None)
    return None if line is None else int(line.split()[1]) * 1024

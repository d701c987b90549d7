"""Hidden states of question and proposed answer, streamed to memory-mapped shards: what a probe reads.

A shard holds a fixed run of answers, so that its content depends neither on how many ranks wrote the shards nor on how
often they were interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.distributed import World, barrier, gather_lists
from calibtrain.errors import UserError
from calibtrain.models.loss_model import HiddenStep
from calibtrain.records import Record

POSITIONS = ("question_last", "answer_last", "answer_mean")
"""Last token of the prompt, last token of the answer's span before an end token, mean over the span without that."""

SHARD_SIZE = 256
INDEX = "index.json"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """For which model and prompt format hidden states, and probes of them, hold: SHA-256 of each."""

    weights_hash: str
    template_hash: str


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of N answers; `shards` are (n, layers, positions, H) float32, in memory or mapped from disk."""

    shards: tuple[NDArray[np.float32], ...]
    layers: tuple[int, ...]
    tokens: NDArray[np.int64]  # (N,) length of prompt and answer: what the extra forward pass reads
    fingerprint: Fingerprint
    forward_passes: int = 1  # extra ones for each answer; 0 where the states came along with the answer's own

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def at(self, layer: int, position: str) -> NDArray[np.float32]:
        """The states of one layer and position (N, H), alone in memory. UserError where they were not collected."""
        if layer not in self.layers or position not in POSITIONS:
            raise UserError(
                f"probe features: no layer {layer} at {position!r}; collected are the layers {list(self.layers)} at "
                f"{', '.join(POSITIONS)}"
            )
        place = (slice(None), self.layers.index(layer), POSITIONS.index(position))
        return np.concatenate([np.asarray(shard[place]) for shard in self.shards])


@dataclass(frozen=True, slots=True)
class _Row:
    """Ids of a prompt with a reply; the answer's tokens in it are ids[start:end]."""

    ids: list[int]
    prompt: int  # length of the prompt
    start: int
    end: int

    @property
    def content(self) -> list[Any]:
        """What tells it from others: the ids, and the span where it is not all of them."""
        return (
            self.ids
            if self.start == self.prompt and self.end >= len(self.ids) - 1
            else [self.ids, self.start, self.end]
        )


def default_layers(depth: int, count: int = 8) -> tuple[int, ...]:
    """`count` layers spread evenly over a model of `depth` blocks, the last one among them."""
    return tuple(sorted({round(depth * (i + 1) / count) for i in range(count)} - {0}))


def depth_of(model: Any) -> int:
    """Number of blocks of a LossModel."""
    return int(model.policy.causal_model.config.get_text_config().num_hidden_layers)


def collect_features(
    model: Callable[[HiddenStep], tuple[Tensor, ...]],
    template: Template,
    records: Sequence[Record],
    texts: Sequence[str],
    folder: Path,
    *,
    layers: Sequence[int],
    depth: int,
    fingerprint: Fingerprint,
    world: World,
    shots: Sequence[Record] = (),
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    lockstep: bool = False,
    on_shard: Callable[[int], None] = lambda shards_done: None,
) -> Features:
    """Write the hidden states of `texts`, the model's replies to `records`, under `folder` and map them. Collective.

    `model` is a LossModel in eval mode or the engine around it; `depth` its number of blocks. Shards that are there
    already are kept; ranks share out the others and must see the same `folder`. `lockstep`: all ranks run as many
    forward passes, as ZeRO-3 must. Raises UserError for layers that the model lacks, and for a folder that holds
    another model's features or other answers'.
    """
    if not records or len(records) != len(texts):
        raise UserError(f"probe features: {len(records)} questions, {len(texts)} answers; they must be equally many")
    layers = tuple(sorted(set(layers)))
    if not layers or layers[0] < 0 or layers[-1] > depth:
        raise UserError(f"probe layers {list(layers)}: choose from 0 (embeddings) to {depth} (the last block)")
    rows = [_row(template, record, text, shots) for record, text in zip(records, texts, strict=True)]
    index = {
        "layers": list(layers),
        "positions": list(POSITIONS),
        "shard_size": shard_size,
        "answers_hash": hashlib.sha256(json.dumps([row.content for row in rows]).encode()).hexdigest(),
        "tokens": [len(row.ids) for row in rows],
        **asdict(fingerprint),
    }
    missing = _start(folder, index, world)
    for first in range(0, len(missing), world.size):
        turn = [_shard_rows(rows, shard, shard_size) for shard in missing[first : first + world.size]]
        passes = max(-(-len(part) // batch_size) for part in turn)
        mine = turn[world.rank] if world.rank < len(turn) else []
        if mine or lockstep:
            spare = passes if lockstep else 0
            states = _forward(model, mine, layers, template.pad_id, batch_size, world.device, spare, rows[0])
            if mine:
                _write(folder / _name(missing[first + world.rank]), states)
        on_shard(min(first + world.size, len(missing)))
    barrier()
    return read_features(folder, fingerprint)


def read_features(folder: Path, fingerprint: Fingerprint) -> Features:
    """Map a folder's shards. Raises UserError when it is not whole, or was written for other weights or template."""
    index = _read_index(folder / INDEX)
    if index is None:
        raise UserError(f"{folder / INDEX}: no such file; run `calibtrain probe` first")
    check_fingerprint(f"{folder}: features", Fingerprint(index["weights_hash"], index["template_hash"]), fingerprint)
    paths = [folder / _name(shard) for shard in range(-(-len(index["tokens"]) // index["shard_size"]))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(paths)} shards are missing; run `calibtrain probe` again")
    tokens = np.array(index["tokens"], dtype=np.int64)
    shards = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    return Features(shards, tuple(index["layers"]), tokens, fingerprint)


def features_of(
    model: Callable[[HiddenStep], tuple[Tensor, ...]],
    template: Template,
    records: Sequence[Record],
    texts: Sequence[str],
    *,
    layers: Sequence[int],
    fingerprint: Fingerprint,
    device: torch.device | str = "cpu",
    shots: Sequence[Record] = (),
    batch_size: int = 16,
) -> Features:
    """The same for a few answers, in memory: in service only the probe's own layer is asked for."""
    rows = [_row(template, record, text, shots) for record, text in zip(records, texts, strict=True)]
    states = _forward(model, rows, tuple(layers), template.pad_id, batch_size, device)
    return Features((states,), tuple(layers), np.array([len(row.ids) for row in rows]), fingerprint)


PROBE_AGAIN = "run `calibtrain probe` for this model and template, into a folder that holds no other's"


def check_fingerprint(what: str, made_for: Fingerprint, used_with: Fingerprint, advice: str = PROBE_AGAIN) -> None:
    """Raise UserError, which ends in the `advice`, when weights or template differ."""
    for name, ours, theirs in (
        ("weights", made_for.weights_hash, used_with.weights_hash),
        ("prompt template", made_for.template_hash, used_with.template_hash),
    ):
        if ours != theirs:
            raise UserError(f"{what} made with {name} {ours[:12]}, used with {theirs[:12]}; {advice}")


def _row(template: Template, record: Record, text: str, shots: Sequence[Record]) -> _Row:
    """`text` is all that was said: the answer's span is found in it, as it was when it was graded."""
    prompt, reply = template.prompt_ids(record, shots), template.completion_ids(text)
    start, stop = read_reply(template, reply, record).span
    stop = max(start + 1, min(stop, len(reply) - 1))  # an empty answer is its end token alone
    return _Row([*prompt, *reply], len(prompt), len(prompt) + start, len(prompt) + stop)


def _shard_rows(rows: Sequence[_Row], shard: int, shard_size: int) -> list[_Row]:
    return list(rows[shard * shard_size : (shard + 1) * shard_size])


@torch.no_grad()
def _forward(
    model: Callable[[HiddenStep], tuple[Tensor, ...]],
    rows: Sequence[_Row],
    layers: tuple[int, ...],
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
    passes: int = 0,
    spare: _Row | None = None,
) -> NDArray[np.float32]:
    """States (len(rows), layers, positions, H), in batches of like length; `spare` fills up to `passes` batches."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    states: list[Any] = [None] * len(rows)
    starts = range(0, len(order), batch_size)
    for start in starts:
        chosen = order[start : start + batch_size]
        for i, state in zip(chosen, _batch(model, [rows[i] for i in chosen], layers, pad_id, device), strict=True):
            states[i] = state
    for _ in range(passes - len(starts)):
        if spare is not None:
            _batch(model, [spare], layers, pad_id, device)
    return torch.stack(states).numpy() if states else np.zeros((0, len(layers), len(POSITIONS), 0), dtype=np.float32)


def _batch(
    model: Callable[[HiddenStep], tuple[Tensor, ...]],
    rows: Sequence[_Row],
    layers: tuple[int, ...],
    pad_id: int,
    device: torch.device | str,
) -> Tensor:
    """States (B, layers, positions, H) float32 on CPU. Padding on the right is behind every position that is read."""
    width = max(row.end for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    for i, row in enumerate(rows):
        ids[i, : row.end] = torch.tensor(row.ids[: row.end])
    found = []
    for states in model(HiddenStep({"input_ids": ids.to(device)}, layers)):
        per_row = [
            torch.stack([one[row.prompt - 1], one[row.end - 1], one[row.start : row.end].mean(0)])
            for row, one in zip(rows, states.float(), strict=True)
        ]
        found.append(torch.stack(per_row).cpu())
    return torch.stack(found, dim=1)


def _start(folder: Path, index: dict[str, Any], world: World) -> list[int]:
    """Write or compare the index; the shards that are still missing, as rank 0 sees them before any rank writes."""
    missing: list[int] = []
    problem: list[str] = []
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / INDEX
        try:
            old = _read_index(path)
            if old is not None and old != index:
                changed = sorted(name for name in index if old.get(name) != index[name])
                problem = [
                    f"{folder}: holds features with other {', '.join(changed)}; delete it or give another folder"
                ]
        except UserError as error:
            problem = [str(error)]
        if not problem:
            _write_text(path, json.dumps(index))
            count = -(-len(index["tokens"]) // index["shard_size"])
            missing = [shard for shard in range(count) if not (folder / _name(shard)).is_file()]
    problem = gather_lists(problem)  # told to all, so that none waits for a rank that has given up
    if problem:
        raise UserError(problem[0])
    return gather_lists(missing)


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete its folder and collect again") from error
    names = {"layers", "positions", "shard_size", "answers_hash", "tokens", "weights_hash", "template_hash"}
    if not isinstance(index, dict) or set(index) != names:
        raise UserError(f"{path}: not an index of probe features; delete its folder and collect again")
    return index


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.npy"


def _write(path: Path, states: NDArray[np.float32]) -> None:
    """Whole or not at all: what has its name can be trusted on resume."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, states, allow_pickle=False)
    os.replace(partial, path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

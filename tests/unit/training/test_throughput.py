"""A trace of steps: what ends a run is told, whether or not there is room for its profile."""

from contextlib import closing

import pytest

from calibtrain.errors import Preempted
from calibtrain.training.throughput import SETTLED, Trace


def traced(folder):
    with closing(Trace(1, folder, 0)) as trace:
        for _ in range(SETTLED + 1):
            trace.before_step()
        raise Preempted(3, "asked")


def test_a_trace_is_kept_where_the_run_is_asked_to_stop(tmp_path):
    with pytest.raises(Preempted):
        traced(tmp_path / "profile")
    assert (tmp_path / "profile" / "rank0.json.gz").stat().st_size


def test_a_trace_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path, caplog):
    (tmp_path / "profile").write_text("no folder")
    with pytest.raises(Preempted):
        traced(tmp_path / "profile")
    assert "the profile cannot be written" in caplog.text

"""Buffers that killed runs left go; those of a run that starts, or that is another's, stay."""

import os
import time

from calibtrain.shared_buffers import AGE_SECONDS, clear_abandoned_buffers


def test_old_buffers_go_and_young_ones_stay(tmp_path):
    def left(name, age):
        path = tmp_path / name
        path.write_bytes(b"x" * (1 << 20))
        os.utime(path, (time.time() - age,) * 2)
        return path

    old = left("deepspeed_allreduce_buffer_0_127.0.0.1_4711_1", AGE_SECONDS + 60)
    young = left("deepspeed_allreduce_buffer_0_127.0.0.1_4712_0", 60)
    other = left("psm_1234", AGE_SECONDS + 60)
    assert clear_abandoned_buffers(tmp_path) == 1 << 20
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)
    assert clear_abandoned_buffers(tmp_path / "none") == 0


def test_a_buffer_that_a_run_maps_stays_its_own(tmp_path):
    path = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_4711_0"
    path.write_bytes(b"kept")
    os.utime(path, (0, 0))
    with path.open("rb") as opened:
        clear_abandoned_buffers(tmp_path)
        assert not path.exists()
        assert opened.read() == b"kept"

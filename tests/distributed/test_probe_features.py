"""Two ranks write the shards of one process, at ZeRO 0 and 3."""

import json

import numpy as np
import pytest
import torch

from tests.distributed.jobs import write_job
from tests.distributed.ranks import forked, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    for stage in (0, 3):
        write_job(folder, f"stage{stage}", penalties=[], training={"zero_stage": stage})
    for ranks in (1, 2):
        ended = run(forked(ranks, str(__file__).replace("test_probe_features", "probe_cases"), str(folder)), folder)
        assert ended.code == 0, ended.output[-6000:]
    return folder


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_write_the_shards_of_one_process(folder, stage):
    whole, shared = (sorted((folder / f"{ranks}-stage{stage}").iterdir()) for ranks in (1, 2))
    assert [path.name for path in whole] == [path.name for path in shared]
    assert [len(np.load(path)) for path in whole if path.suffix == ".npy"] == [3, 3, 2]
    for one, other in zip(whole, shared, strict=True):
        if one.suffix == ".npy":
            np.testing.assert_allclose(np.load(other), np.load(one), atol=1e-5, rtol=1e-5)
        else:
            assert one.read_text() == other.read_text()


def test_zero_does_not_change_what_is_read(folder):
    for one, other in zip(
        sorted((folder / "1-stage0").glob("*.npy")), sorted((folder / "2-stage3").glob("*.npy")), strict=True
    ):
        np.testing.assert_allclose(np.load(other), np.load(one), atol=1e-5, rtol=1e-5)


def test_ranks_score_options_as_one_process_does(folder):
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("options-*.json")}
    assert len(files) == 6  # (1 + 2 ranks) x 2 stages
    expected = files["options-1-stage0-0"]
    assert {len(answer["options"]) for answer in expected["answers"]} == {3, 5}
    for name, found in files.items():
        assert found["features"] == expected["features"], name
        np.testing.assert_allclose(found["table"], expected["table"], atol=1e-5, rtol=1e-5, err_msg=name)
        for one, other in zip(found["answers"], expected["answers"], strict=True):
            np.testing.assert_allclose(one["option_logprobs"], other["option_logprobs"], atol=1e-5, rtol=1e-5)
            numbers = {"option_logprobs", "token_logprobs", "confidence"}
            assert {k: v for k, v in one.items() if k not in numbers} == {
                k: v for k, v in other.items() if k not in numbers
            }


def test_ranks_share_the_work_and_keep_step_under_zero_3(folder):
    passes = {
        name: [torch.load(folder / f"2-{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("stage0", "stage3")
    }
    assert passes == {
        "stage0": [3, 2],
        "stage3": [3, 3],
    }  # batches of two over shards of 3, 2 on one rank and 3 on the other

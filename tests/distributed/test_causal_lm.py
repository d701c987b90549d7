"""loss_terms_from_model in a user's own loop: the same gradients under DDP and DeepSpeed ZeRO 0 to 3 as without them."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.causal_lm_cases import STEPS
from tests.distributed.ranks import forked, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

CASES = ("ddp", "ddp_find_unused", "ddp_checkpointed", "zero0", "zero1", "zero2", "zero3", "zero3_checkpointed")
CASES += ("zero3_token_set", "zero3_packed", "ddp_packed")
REFERENCES = {"set": "ddp_token_set", "packed": "ddp_sft", "": "ddp"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal_lm")
    script = str(__file__).replace("test_causal_lm", "causal_lm_cases")
    for ranks, names in ((1, REFERENCES.values()), (2, CASES)):
        ended = run(forked(ranks, script, str(folder), ",".join(names)), folder)
        assert ended.code == 0, ended.output[-6000:]
    return {(name, ranks): torch.load(folder / f"{name}-{ranks}.pt", weights_only=True)
            for name, ranks in [*((name, 1) for name in REFERENCES.values()), *((name, 2) for name in CASES)]}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_gradients_and_losses(results, name):
    found, expected = results[name, 2], results[REFERENCES.get(name.rpartition("_")[2], "ddp"), 1]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][1] < found["losses"][0]
    for step in range(STEPS):
        assert found["gradients"][step].keys() == expected["gradients"][step].keys()
        for key, gradient in expected["gradients"][step].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found["gradients"][step][key], gradient, atol=2e-5 * scale, rtol=0.0, msg=key)

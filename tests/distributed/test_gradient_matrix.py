"""Every loss takes the same three steps on ranks at each ZeRO stage as in one plain process, and with generation in between.

Objectives, penalties, a confidence head and weight penalties, each with full weights and LoRA, tied and untied heads.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.gradient_matrix import KINDS, LOSSES, REFERENCE, STAGES
from tests.distributed.ranks import forked, run
from tests.distributed.test_gradients import error
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(6000)]

SECONDS = 2400
BOUNDS = (1e-6, 2e-6, 4e-6)
"""Of each step's gradient: a step begins from what the one before has rounded."""
SCRIPT = str(__file__).replace("test_gradient_matrix", "gradient_runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "untied", tied=False)
    return folder


def results(folder, ranks, names):
    ended = run(forked(ranks, SCRIPT, str(folder), ",".join(names)), folder, SECONDS)
    assert ended.code == 0, ended.output[-6000:]
    return {name: torch.load(folder / f"{name}-{ranks}.pt", weights_only=True) for name in names}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_takes_the_same_steps_at_every_stage(folder, kind):
    families, stages = KINDS[kind], [stage for stage in STAGES if stage != REFERENCE]
    plain = results(folder, 1, [f"{family}_{REFERENCE}" for family in families])
    found = results(folder, 2, [f"{family}_{stage}" for stage in stages for family in families])
    off = []
    for family in families:
        expected = plain[f"{family}_{REFERENCE}"]
        assert len(expected["gradients"]) == 3
        assert all(norm > 0 for norm in expected["norms"])
        for stage in stages:
            one = found[f"{family}_{stage}"]
            pairs = zip(one["gradients"], expected["gradients"], strict=True)
            errors = [error(*pair) for pair in pairs] + [error(one["weights"], expected["weights"])]
            small = all(each < bound for each, bound in zip(errors, (*BOUNDS, 1e-6), strict=True))
            if not small or one["said"] != expected["said"]:
                off.append(f"{family}_{stage}: {', '.join(f'{each:.1e}' for each in errors)}")
    assert not off, "\n".join(off)

"""What a server's log-probs tell of its weights, in each dtype."""

from __future__ import annotations

import pytest

from calibtrain.engines import Completion
from calibtrain.training.weight_proof import Told, WeightProof

TEXTS, PROMPTS = [(5, 6, 7, 8, 9)], [(5, 6)]
OURS = [-1.0, -2.0, -3.0, -9.0]


def proof(dtype="fp32", exact=True):
    return WeightProof(None, TEXTS, PROMPTS, dtype=dtype, tolerance=0.25 if dtype == "bf16" else 0.01, exact=exact)


def problem(made, theirs, ours, drawn=(-0.5,), own_drawn=(-0.5,)):
    return made.problem(Told([list(theirs)], [Completion((7,), tuple(drawn), True)]), [list(ours), list(own_drawn)])


def moved(values, by):
    return [value + by for value in values]


def test_one_log_prob_is_enough_in_fp32_and_the_mean_counts_in_bf16():
    one_off = [-1.0, -2.0, -3.0, -8.0]
    assert "the largest difference is 1 nats (at most 0.01" in problem(proof(), one_off, OURS)
    made = proof("bf16")
    assert problem(made, one_off, OURS) is None
    assert made.found == {"engine_gap": 1.0, "engine_gap_mean": 0.2}
    assert "the mean difference is 0.4 nats (at most 0.25" in problem(made, moved(OURS, 0.5), OURS)
    assert problem(proof(), OURS, OURS, drawn=(-0.52,)) is not None  # of a draw
    assert problem(proof(), [float("nan"), *OURS[1:]], OURS) is not None


@pytest.mark.parametrize(
    ("dtype", "exact", "ours", "theirs", "stale"),
    [
        ("fp32", True, 1e-3, 1e-3, False),
        ("fp32", True, 1e-3, 0.0, True),
        ("fp32", True, 1e-3, 5e-4, False),
        ("fp32", True, 1e-6, 0.0, False),  # rounding
        ("bf16", True, 0.05, 0.0, True),
        ("bf16", True, 5e-3, 0.0, False),
        ("bf16", False, 0.05, 0.0, False),  # LoRA whose change is rounded away
    ],
)
def test_a_server_that_stays_where_the_trainer_moved_is_stale(dtype, exact, ours, theirs, stale):
    made = proof(dtype, exact)
    assert problem(made, OURS, OURS) is None
    found = problem(made, moved(OURS, theirs), moved(OURS, ours))
    assert (found is not None) == stale
    assert not stale or "its weights are stale: the trainer's log-probs moved by" in found
    assert made.found["policy_moved"] == pytest.approx(ours)

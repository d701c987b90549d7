"""--keep: what it reads, what it refuses, and what it says to try next."""

import pytest

from calibtrain.errors import UserError
from calibtrain.pipeline.quantize_gate import check, next_to_try, parse_keep, refusal

METHODS = ("minmax", "smoothquant", "awq", "preserve")


def row(difference, low=None, high=None):
    return {"before": 0.5, "after": 0.4, "difference": difference, "low": low, "high": high}


ROWS = {
    "auroc": row(-0.02, -0.05, 0.01),
    "certified_coverage": row(-0.1, -0.2, 0.0),
    "accuracy": row(0.03, 0.01, 0.05),
    "ece_debiased": row(0.004, -0.01, 0.02),
    "brier": row(None),
    "changed": {"before": None, "after": 0.3, "difference": 0.3, "low": 0.27, "high": 0.33},
}


def test_limits_are_read():
    assert parse_keep("auroc=0.01, coverage=0.05") == {"auroc": 0.01, "coverage": 0.05}
    assert parse_keep(None) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rouge=0.1", "'rouge' is none of accuracy, auroc, coverage, ece, brier, changed"),
        ("auroc", "'auroc' is not KEY=LIMIT"),
        ("auroc=little", "auroc='little' is not a number"),
        ("auroc=1.5", "not between 0 and 1"),
        ("auroc=nan", "not between 0 and 1"),
        ("auroc=-0.1", "not between 0 and 1"),
        ("auroc=0.1,auroc=0.2", "named twice"),
        ("", "says nothing"),
    ],
)
def test_limits_that_cannot_be_read(text, words):
    with pytest.raises(UserError, match=words):
        parse_keep(text)


@pytest.mark.parametrize(
    ("key", "allowed", "lost", "kept"),
    [
        ("auroc", 0.02, 0.02, True),
        ("auroc", 0.019, 0.02, False),
        ("coverage", 0.05, 0.1, False),
        ("accuracy", 0.0, -0.03, True),  # a gain is no loss
        ("ece", 0.003, 0.004, False),
        ("ece", 0.005, 0.004, True),
        ("changed", 0.3, 0.3, True),
        ("changed", 0.29, 0.3, False),
        ("brier", 1.0, None, False),  # not known is not kept
    ],
)
def test_the_point_estimate_decides(key, allowed, lost, kept):
    (found,) = check({key: allowed}, ROWS)
    assert found.lost == (None if lost is None else pytest.approx(lost))
    assert found.kept is kept


def test_the_interval_is_that_of_the_loss():
    (found,) = check({"auroc": 0.01}, ROWS)
    assert (found.low, found.high) == (-0.01, 0.05)
    assert found.told() == "AUROC lost: 0.020 (−0.010 to 0.050), allowed 0.010"


def test_the_message_says_by_how_much_and_what_to_try():
    found = refusal(check({"coverage": 0.05, "accuracy": 0.1}, ROWS), "w4a16", 128, "awq", METHODS)
    assert found == (
        "refused: certified coverage lost: 10.0% (0.0% to 20.0%), allowed 5.0%. Next to try: --method preserve"
    )
    assert next_to_try("w4a16", 128, "preserve", METHODS) == "--group-size 64"
    assert next_to_try("w4a16", 32, "preserve", METHODS) == "--scheme w8a16"
    assert next_to_try("w8a8", None, "preserve", METHODS).startswith("--scheme w8a16")
    assert "--ignore" in next_to_try("w8a16", 32, "preserve", METHODS)

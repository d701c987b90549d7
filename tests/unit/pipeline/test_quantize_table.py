"""The table's numbers against answers made by hand, and what is said of them."""

import math

import numpy as np
import pytest

from calibtrain.abstention.certificate import certify
from calibtrain.calibration.ranking import auroc
from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError
from calibtrain.pipeline import quantize_table, quantize_words
from calibtrain.pipeline.quantize_table import ROWS, Side, changes, compare, kept_threshold


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(quantize_table, "CERTIFICATE_REPLICATES", 40)


def answered(texts, right, prefix="q"):
    return [
        Answer(f"{prefix}{i}", "?", text, (-0.1,), bool(correct))
        for i, (text, correct) in enumerate(zip(texts, right, strict=True))
    ]


def side(confidence, right, texts=None, risk=0.2, own=None):
    confidence, right = np.asarray(confidence, float), np.asarray(right, bool)
    own = confidence if own is None else np.asarray(own, float)
    answers = answered(texts or ["a"] * len(right), right)
    return Side(answers, confidence, own, (answers, own), certify(own, right, risk, 0.1))


def drawn(n, seed, noise=0.0):
    """Calibrated answers; `noise` moves the log-odds that are stated, and the grade of some answers with them."""
    rng = np.random.default_rng(seed)
    logit = np.random.default_rng(0).normal(1.5, 2, n)
    stated = logit + noise * rng.normal(size=n)
    uniform = np.random.default_rng(1).random(n)
    flipped = rng.random(n) < 0.1 * noise
    right = (uniform < 1 / (1 + np.exp(-logit))) ^ flipped
    return 1 / (1 + np.exp(-stated)), right


def test_the_rows_of_answers_made_by_hand():
    before = side([0.9, 0.8, 0.6, 0.1], [1, 1, 0, 0], texts=["a", "b", "c", "d"])
    after = side([0.7, 0.9, 0.8, 0.4], [0, 1, 1, 0], texts=["x", "b", "y", "z"], own=[0.6, 0.9, 0.8, 0.2])
    found = compare(before, after, risk=0.2, delta=0.1, replicates=5)
    rows = found["rows"]

    def both(key):
        return rows[key]["before"], rows[key]["after"], rows[key]["difference"]

    assert found["questions"] == 4
    assert both("accuracy") == (0.5, 0.5, 0.0)
    assert both("mean_confidence_old") == pytest.approx((0.6, 0.7, 0.1))
    assert both("mean_confidence") == pytest.approx((0.6, 0.625, 0.025))
    assert both("ece_old") == pytest.approx(((0.1 + 0.2 + 0.6 + 0.1) / 4, (0.7 + 0.1 + 0.2 + 0.4) / 4, 0.1))
    assert both("ece") == pytest.approx((0.25, (0.6 + 0.1 + 0.2 + 0.2) / 4, 0.025))
    assert both("brier") == pytest.approx(((0.01 + 0.04 + 0.36 + 0.01) / 4, (0.36 + 0.01 + 0.04 + 0.04) / 4, 0.0075))
    assert both("auroc") == pytest.approx((1.0, 1.0, 0.0))
    assert both("aurc") == pytest.approx(((0 + 0 + 1 / 3 + 2 / 4) / 4, (0 + 0 + 1 / 3 + 2 / 4) / 4, 0.0))
    assert both("coverage") == pytest.approx((0.5, 0.5, 0.0))
    assert {key: found["changed"][key] for key in ("changed", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")} == {
        "changed": 3, "right_to_wrong": 1, "wrong_to_right": 1, "wrong_to_wrong": 1,
    }  # fmt: skip
    assert rows.keys() == {one.key for one in ROWS} | {"changed"}


def test_changes_are_those_that_grading_sees_and_mcnemar_is_exact():
    before = answered(["Côte d'Ivoire", "a", "b", "c", "d", "e", "f"], [1, 1, 1, 1, 1, 1, 0])
    after = answered(["cote divoire", "x", "x", "x", "x", "x", "y"], [1, 0, 0, 0, 0, 0, 0])
    found = changes(before, after)
    assert (found["changed"], found["right_to_wrong"], found["wrong_to_wrong"]) == (6, 5, 1)
    assert found["mcnemar_p"] == pytest.approx(2 * 0.5**5)
    assert found["row"]["after"] == pytest.approx(6 / 7)
    assert found["row"]["low"] < 6 / 7 < found["row"]["high"]
    assert changes(before, before)["mcnemar_p"] == 1.0


def test_intervals_hold_the_same_questions_together():
    """Two models that err alike differ by less noise than two samples would: the interval must know."""
    q, right = drawn(600, 0)
    same = compare(side(q, right), side(q, right), risk=0.2, delta=0.1, replicates=40)["rows"]
    for key in ("accuracy", "auroc", "brier", "ece", "coverage", "certified_coverage"):
        assert (same[key]["difference"], same[key]["low"], same[key]["high"]) == (0.0, 0.0, 0.0), key
    other = compare(side(q, right), side(*drawn(600, 5, noise=1.0)), risk=0.2, delta=0.1, replicates=100)["rows"]
    unpaired = 1.96 * math.sqrt(2 * right.mean() * (1 - right.mean()) / 600)
    assert 0 < other["accuracy"]["high"] - other["accuracy"]["low"] < 2 * unpaired
    assert other["auroc"]["low"] < other["auroc"]["difference"] < other["auroc"]["high"] < 0


def test_certified_coverage_is_the_certificates_and_none_counts_as_nothing():
    q, right = drawn(600, 0)
    lost = side(q, np.zeros(600))
    row = compare(side(q, right), lost, risk=0.2, delta=0.1, replicates=2)["rows"]["certified_coverage"]
    certified = certify(q, right, 0.2, 0.1).certificate
    assert (row["before"], row["after"], row["difference"]) == (certified.coverage, 0.0, -certified.coverage)
    assert row["low"] <= row["difference"] <= row["high"] < 0


def test_the_old_threshold_is_tried_on_the_new_answers_with_the_old_calibrator():
    q, right = drawn(400, 0)
    before = side(q, right)
    worse = side(np.clip(q + 0.2, 0, 1), right, own=q)
    found = kept_threshold(before, worse)
    threshold = before.certification.certificate.threshold
    assert found["after"]["answered"] == int((np.clip(q + 0.2, 0, 1) >= threshold).sum()) > found["before"]["answered"]
    assert found["after"]["wrong"] > found["before"]["wrong"]
    assert kept_threshold(side(q, np.zeros(400)), worse) is None


def test_one_class_alone_has_no_auroc_and_no_crash():
    rows = compare(side([0.9] * 30, [1] * 30), side([0.8] * 30, [1] * 30), risk=0.2, delta=0.1, replicates=3)["rows"]
    assert rows["auroc"] == {"before": None, "after": None, "difference": None, "low": None, "high": None}
    assert auroc(quantize_table._state(np.array([0.9]), np.array([True]))) is not None


def test_other_questions_are_refused():
    a, b = side([0.9, 0.8], [1, 0]), side([0.9, 0.8, 0.7], [1, 0, 1])
    with pytest.raises(UserError, match="did not answer the same test questions"):
        compare(a, b, risk=0.2, delta=0.1)


def content_of(before, after, **changes):
    table = compare(before, after, risk=0.2, delta=0.1, replicates=20)
    certificate = [one.certification.certificate and one.certification.certificate.as_dict() for one in (before, after)]
    return {
        "table": table,
        "certificate_before": certificate[0],
        "certificate": certificate[1],
        "certification": after.certification.reason,
        "label": "4-bit",
        "method": "awq",
        "cost": {"before": {"disk_bytes": 2e9}, "after": {"disk_bytes": 5e8}},
        **changes,
    }


def test_the_words_say_what_changed_and_that_the_old_threshold_is_void(capsys):
    q, right = drawn(1000, 0)
    turned = q <= np.sort(q)[89]  # so that the best answers can still be certified
    after = side(np.clip(q + 0.5, 0, 1), right & ~turned, texts=["b" if one else "a" for one in turned], own=q)
    content = content_of(side(q, right), after)
    told = quantize_words.told(content)
    became = int((right & turned).sum())
    assert told[0] == (
        f"Of 1,000 questions 90 are answered otherwise than before: {became} right before and wrong now and {90 - became} "
        "wrong before and wrong in another way now."
    )
    assert told[1].endswith("Chance alone does not explain that difference.")
    assert "where at most 20% were promised: more than promised" in told[2]
    assert "not carried over" in told[2]
    assert told[3].startswith("Certified anew on its own answers: from ")
    quantize_words.print_table(content)
    printed = capsys.readouterr().out
    for part in ("AUROC", "Answers changed", "McNemar", "2.00 GB", "500.0 MB", "0.25×", "full-precision arithmetic"):
        assert part in printed


def test_the_words_of_a_lost_certificate_and_of_no_change():
    q, right = drawn(600, 0)
    told = quantize_words.told(content_of(side(q, right), side(q, right)))
    assert told[0] == "Of 600 questions all are answered as before."
    lost = quantize_words.told(content_of(side(q, right), side(q, np.zeros(600))))
    assert "The full-precision model had a certificate, and it is lost; without one it answers nothing." in lost[-1]
    never = quantize_words.told(content_of(side(q, np.zeros(600)), side(q, np.zeros(600))))
    assert "Nor had the full-precision model" in never[-1]
    assert len(never) == 3  # nothing is said of a threshold that there never was

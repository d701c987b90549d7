"""The report of a quantised model: right words, other people's text escaped, nothing loaded, no figure without numbers."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError
from calibtrain.pipeline import quantize_page
from calibtrain.pipeline.quantize_page import Part, kinds_of, read_quantization, report_part
from calibtrain.pipeline.report import Measured, ReportData, render_report
from tests.unit.pipeline.test_quantize_table import content_of, drawn, few, side  # noqa: F401

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def part():
    q, right = drawn(300, 0)
    turned = np.arange(300) % 5 == 0
    before = side(q, right)
    after = side(np.clip(q + 0.1, 0, 1), right & ~turned, texts=[EVIL if one else "a" for one in turned], own=q)
    before.answers[:] = [replace(one, question=f"{EVIL} {i}", accepted=(EVIL,)) for i, one in enumerate(before.answers)]
    content = content_of(
        before, after, source=f"out/{EVIL}", source_hash="s", model_hash="m", template_hash="t",
        quantization={"full_precision": [EVIL] * 9, "massive_first_tokens": {EVIL: {}}, "no_folds": EVIL, "seconds": 1.0},
        settings={"alpha": 0.5}, calibration_set={"n": 256, "verdict": EVIL}, format=quantize_page.FORMAT,
    )  # fmt: skip
    return Part(content, before.answers, after.answers, (before.old, after.old))


def report(part, **changes):
    measured = [Measured("full precision", part.before, part.confidence[0].tolist())]
    measured.append(Measured("quantised", part.after, part.confidence[1].tolist()))
    return ReportData("tiny", {}, {}, None, None, measured, 0.2, 0.1, quantized=part, **changes)


def test_the_page_says_it_and_escapes_what_others_wrote(part):
    page = render_report(report(part))
    assert "What quantising cost" in page
    assert "60 are answered otherwise than before" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "Before training" not in page
    assert page.count("<h2>Before and after</h2>") == 0
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "NaN" not in page
    assert not re.search(r'="[^"]*\bnan\b', page)


def test_without_samples_no_question_and_no_answer_is_on_the_page(part):
    assert report_part(part)["samples"]
    assert not report_part(part, samples=False)["samples"]
    page = render_report(report(part, samples=False))
    assert "Some answers that turned" not in page


def test_every_answer_is_drawn_once_and_by_its_kind(part):
    drawn_part = report_part(part)
    kinds = kinds_of(part.before, part.after)
    for kind, one in (("same", "h0"), ("right_to_wrong", "l6.8"), ("other", "m-2.4")):
        (path,) = re.findall(rf'<path class="q-{kind}" d="([^"]*)"', str(drawn_part["scatter"]))
        assert path.count(one) == (kinds == kind).sum()
    assert "old threshold" in str(drawn_part["scatter"])


def test_bars_stack_to_the_share_that_changed():
    before = np.full(10, 0.95)
    kinds = np.array(["right_to_wrong"] * 2 + ["wrong_to_right"] + ["other"] + ["same"] * 6, dtype=object)
    heights = [
        float(one) for one in re.findall(r'class="b-[^>]*height="([0-9.]+)"', str(quantize_page.turned(before, kinds)))
    ]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert len(heights) == 3


def test_confidences_at_the_ends_are_drawn_too():
    ends = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    assert "inf" not in str(quantize_page.shift(ends, 1 - ends))
    assert "nan" not in str(quantize_page.scatter(ends, ends, np.array(["same"] * 6, dtype=object), 1.1))
    assert "nan" not in str(quantize_page.turned(np.array([0.5]), np.array(["same"], dtype=object)))


def test_an_answer_graded_alike_in_other_words_is_another_one():
    one = Answer("q", "?", "France", (-0.1,), True)
    kinds = kinds_of([one] * 3, [one, replace(one, text="french republic"), replace(one, text="the france")])
    assert kinds.tolist() == ["same", "other", "same"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: "{", "cannot be read"),
        (lambda content: json.dumps(content | {"format": 0}), "not of format 1"),
        (lambda content: json.dumps({key: one for key, one in content.items() if key != "table"}), "table is missing"),
    ],
)
def test_a_file_that_cannot_be_read_whole(part, tmp_path, change, words):
    path = tmp_path / "quantization.json"
    path.write_text(json.dumps(part.content))
    assert read_quantization(path) == json.loads(json.dumps(part.content))
    path.write_text(change(part.content))
    with pytest.raises(UserError, match=words):
        read_quantization(path)

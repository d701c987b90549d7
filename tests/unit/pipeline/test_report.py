"""The report page: right numbers, safe text, no network, and plain words where there is nothing to show."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from calibtrain.abstention.certificate import certified_curve, certify
from calibtrain.calibration import metrics
from calibtrain.calibration.intervals import wilson
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline.report import CompositionRow, Measured, ReportData, render_report, write_report
from calibtrain.pipeline.report_numbers import comparison, stage_of, threshold_table, words_table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"
VOID = {"meta", "input", "br", "img", "link", "hr"}


def answers(n=240, seed=0, text="Japan"):
    rng = np.random.default_rng(seed)
    q = rng.beta(1.2, 0.8, n).clip(0.01, 0.999)
    return [
        Answer(f"q{i}", f"Question {i}?", text, (math.log(p),), bool(rng.random() < p), ("Japan", "Kenya"))
        for i, p in enumerate(q)
    ]


def report(**changes):
    own = answers()
    q, y = [a.confidence for a in own], [a.correct for a in own]
    values = {
        "run_name": "run",
        "config": {"seed": 0},
        "versions": {"torch": "2"},
        "git_hash": "abc",
        "data_hash": "d",
        "measured": [Measured("raw", answers(seed=1)), Measured("tuned", own)],
        "target_risk": 0.3,
        "delta": 0.1,
        "certification": certify(q, y, 0.3, 0.1),
        "certified_curve": certified_curve(q, y, [0.1, 0.3], 0.1),
        "composition": [CompositionRow("continent", "Asia", 0.5, 0.4)],
        "training": [{"event": "log", "step": i, "train/loss/nll": 2.0 / i} for i in range(1, 5)],
        "bootstrap_replicates": 10,
    }
    return ReportData(**{**values, **changes})


class Page(HTMLParser):
    """Checks that tags nest, and keeps scripts, ids, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.scripts, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data

    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def html():
    return render_report(report())


def test_page_is_well_formed_has_unique_ids_and_named_controls(html):
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    labels = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    assert {attributes["id"] for tag, attributes in page.tags if tag == "input"} <= labels
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(figures) == 7  # refusals, 2 reliability, 2 histograms, risk, training loss
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)


def test_nothing_is_loaded_from_anywhere(html):
    page = Page(html)
    assert not [a for _, a in page.tags for key in a if key in ("src", "srcset", "action", "data", "xlink:href")]
    assert all(a.get("href", "#").startswith("#") for _, a in page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_hostile_text_stays_text():
    data = report(
        run_name=HOSTILE,
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        measured=[Measured(HOSTILE, answers(text=HOSTILE, seed=1)), Measured(HOSTILE, answers(text=HOSTILE))],
        composition=[CompositionRow(HOSTILE, HOSTILE, 0.5, 0.5)],
        composition_verdict=HOSTILE,
    )
    html = render_report(data)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [a for _, a in page.tags for key in a if key.startswith("on")]
    assert page.text.count(HOSTILE) > 5  # shown as it is, template braces included
    assert page.data()["n"] == 240


def test_slider_numbers_are_those_of_the_answers(html):
    own = answers()
    q, y = np.array([a.confidence for a in own]), np.array([a.correct for a in own])
    data = Page(html).data()
    thresholds = [row["threshold"] for row in data["rows"]]
    assert thresholds == sorted(thresholds)
    assert (thresholds[0], thresholds[-1], data["n"], data["right"]) == (0.0, 1.0, 240, y.sum())
    for row in data["rows"]:
        kept = q >= row["threshold"]
        assert (row["answered"], row["wrong"]) == (kept.sum(), (kept & ~y).sum())
        assert (row["low"], row["high"]) == pytest.approx(wilson(int((kept & ~y).sum()), int(kept.sum())))
    certificate = report().certification.certificate
    row = data["rows"][data["certified"]]
    # The test questions here are the certification's own, so the counts must be the certificate's.
    assert (row["threshold"], row["answered"]) == (certificate.threshold, certificate.n_answered)
    assert row["wrong"] == certificate.n_wrong


def test_comparison_shows_the_metrics_and_the_null_beside_every_ece(html):
    stages = [stage_of("raw", answers(seed=1), None), stage_of("tuned", answers(), None)]
    rows = {row.name: row for row in comparison(stages, 10)}
    ece = rows["Calibration error (ECE)"]
    assert [cell.estimate for cell in ece.cells] == [metrics.ece(stage.state) for stage in stages]
    assert ece.nulls == [metrics.ece_null(stage.state) for stage in stages]
    assert all(cell.low >= 0 for cell in ece.cells)
    assert ece.change.estimate == pytest.approx(ece.cells[1].estimate - ece.cells[0].estimate)
    assert Page(html).text.count("chance alone: ") == 2


def test_replaced_confidences_are_used():
    own = answers(50)
    stage = stage_of("with temperature", own, [0.5] * 50)
    assert stage.mean_confidence == pytest.approx(0.5)
    assert threshold_table(stage, None)["rows"][100]["answered"] == 50  # threshold 0.5
    with pytest.raises(ValueError, match="shorter"):
        stage_of("with temperature", own, [0.5] * 49)


def test_words_are_judged_by_their_band():
    stage = stage_of("tuned", answers(100), [0.9] * 100)
    rows = {row["word"].name: row for row in words_table(stage)}
    assert rows["very likely"]["n"] == 100
    assert rows["very likely"]["honest"] == (rows["very likely"]["high"] >= 0.8)
    assert rows["likely"]["n"] == 0
    assert math.isnan(rows["likely"]["right"])


def test_without_a_certificate_it_says_so():
    own = answers()
    failed = certify([a.confidence for a in own], [a.correct for a in own], 0.001, 0.05)
    assert failed.certificate is None
    for certification, words in ((failed, failed.reason), (None, "Certification was not run")):
        page = Page(render_report(report(certification=certification, certified_curve={})))
        assert "No threshold is certified" in page.text
        assert words in page.text
        assert page.data()["certified"] is None
        assert "jump" not in [a.get("id") for _, a in page.tags]


@pytest.mark.parametrize("grade", [None, "no answers"])
def test_without_graded_answers_it_says_so(grade):
    ungraded = [] if grade else [Answer("a", "q", "t", (-1.0,), None)]
    measured = [Measured("raw", ungraded), Measured("tuned", ungraded)]
    page = Page(render_report(report(measured=measured, certification=None, certified_curve={}, training=[])))
    assert "No graded answers" in page.text
    page = Page(render_report(report(measured=[Measured("raw", ungraded), Measured("tuned", answers())])))
    assert "nothing to compare" in page.text
    assert page.data()["n"] == 240


@pytest.mark.parametrize("grade", [True, False])
def test_answers_of_one_kind_and_extreme_confidence(grade):
    same = [Answer(str(i), "q", "t", (0.0,) if i % 2 else (-800.0,), grade) for i in range(20)]
    page = Page(render_report(report(measured=[Measured("raw", same), Measured("tuned", same)], certification=None)))
    assert page.data()["right"] == 20 * grade
    assert "nan" not in page.text.lower().split()


def test_write_report_takes_a_directory_or_a_file(tmp_path):
    small = report(measured=[Measured("tuned", answers(30))])
    assert write_report(tmp_path, small) == tmp_path / "report.html"
    assert write_report(tmp_path / "sub" / "page.html", small).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["page.html"]

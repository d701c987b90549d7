"""`calibtrain confidence` on a finished run of a tiny model: what it writes, what it does not do twice, what it refuses."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.errors import UserError
from calibtrain.pipeline import confidence as pipeline
from tests.end_to_end.runs import finished_run

SOURCES = ("likelihood", "likelihood_min", "stated_number", "self_consistency")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confidence")
    sizes = {"train": 8, "calibration": 8, "temperature": 24, "certification": 8, "test": 20}
    return finished_run(folder, sizes, 3)


@pytest.fixture
def half_right(monkeypatch):
    """Every other answer is called right: a random model's never is. Counts the questions asked."""
    answer, asked = pipeline.answer_questions, []

    def called(*args, **more):
        found = answer(*args, **more)
        asked.append(len(found.answers))
        return replace(found, answers=[replace(one, correct=i % 2 == 0) for i, one in enumerate(found.answers)])

    monkeypatch.setattr(pipeline, "answer_questions", called)
    return asked


def test_sources_are_compared_and_nothing_is_done_twice(finished, half_right):
    command = ["confidence", str(finished), "--sources", ",".join(SOURCES)]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "self_consistency" in done.output
    assert sorted(half_right) == [20, 24]
    table = json.loads((finished / "confidence" / "table.json").read_text())
    rows = {row["source"]: row for row in table["sources"]}
    assert tuple(rows) == SOURCES
    assert table["n"] == 20
    assert all(0 <= row["auroc_raw"] <= 1 for row in rows.values())
    assert rows["likelihood"]["forward_passes"] == 0
    assert rows["self_consistency"]["forward_passes"] >= 8
    assert rows["stated_number"]["failed"] == 20  # a random model says no number
    scores = [json.loads(line) for line in (finished / "confidence" / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 20
    assert set(scores[0]["scores"]) == set(SOURCES)
    CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert len(half_right) == 2
    assert json.loads((finished / "confidence" / "table.json").read_text()) == table


def test_a_mistake_is_told(finished, tmp_path):
    with pytest.raises(UserError, match="likelyhood"):
        pipeline.run(finished, sources=["likelyhood"])
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="no exported model"):
        pipeline.run(tmp_path, sources=["likelihood"])

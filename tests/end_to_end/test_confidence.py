"""`calibtrain confidence` on a finished run of a tiny model: what it writes, what it does not do twice, what it refuses."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import confidence as pipeline
from tests.distributed.jobs import write_job
from tests.tiny import write_tiny_model

SOURCES = ("likelihood", "likelihood_min", "stated_number", "self_consistency")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confidence")
    sizes = {"train": 8, "calibration": 8, "temperature": 24, "certification": 8, "test": 20}
    job = write_job(folder, data={"splits": sizes}, evaluation={"batch_size": 16, "max_new_tokens": 3})
    rows = [{"question": f"What is {i}?", "answers": ["unknown"]} for i in range(500)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = load_config(job).output_dir
    write_tiny_model(output / "model", max_position_embeddings=512)
    (output / "config.yaml").write_text(job.read_text())
    return output


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

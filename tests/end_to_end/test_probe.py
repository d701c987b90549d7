"""`calibtrain probe` on a finished run of a tiny model: what it writes, what it reuses and what it refuses."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import probe as pipeline
from calibtrain.pipeline.evaluate import Loaded
from tests.distributed.jobs import write_job
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose questions a tiny model gets right about half the time: every other question accepts what it says."""
    folder = tmp_path_factory.mktemp("probe")
    job = write_job(
        folder, data={"splits": {"train": 8, "calibration": 16, "temperature": 16, "certification": 8, "test": 16}}
    )
    config = load_config(job)
    output = config.output_dir
    write_tiny_model(output / "model")
    (output / "config.yaml").write_text(job.read_text())
    records = pipeline.prepare(config).splits
    said = {}
    loaded = Loaded(config, output / "model")
    for split in ("calibration", "temperature", "test"):
        for i, answer in enumerate(loaded.measure(records[split]).answers):
            said[answer.question] = answer.text if i % 2 else "never said"
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        row["answers"] = [said.get(row["question"]) or "never said"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return output


@pytest.fixture(scope="module")
def measured(finished):
    done = CliRunner().invoke(cli.app, ["probe", str(finished), "--layers", "1,2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "AUROC, calibrated" in done.output
    return json.loads((finished / "probe" / "measured.json").read_text())


def test_probe_and_likelihood_are_compared_on_the_test_questions(measured, finished):
    assert measured["n"] == 16
    assert measured["layer"] in (1, 2)
    assert measured["cost"]["forward_passes"] == 1
    for stage in ("raw", "calibrated"):
        for row in measured[stage].values():
            estimate, _, _ = row["difference"]
            assert estimate == pytest.approx(row["probe"] - row["likelihood"])
    probe, calibrator = pipeline.load(
        finished, Loaded(load_config(finished / "config.yaml"), finished / "model").template.hash
    )
    assert probe.kind == "linear"
    assert calibrator.method == "platt"
    assert np.isfinite(calibrator.apply([0.2, 0.8])).all()


def test_a_second_call_answers_and_collects_nothing_again(measured, finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model ran again")

    monkeypatch.setattr(pipeline, "with_progress", never)
    monkeypatch.setattr("calibtrain.confidence.features._batch", never)
    again = pipeline.run(finished, layers=(1, 2))
    assert again == measured


def test_other_weights_are_refused(measured, finished, tmp_path):
    (tmp_path / "probe").symlink_to(finished / "probe")
    tiny_model(len(tiny_tokenizer()), seed=1).save_pretrained(tmp_path / "model")
    template = json.loads((finished / "probe" / "probe.json").read_text())["fingerprint"]["template_hash"]
    with pytest.raises(UserError, match="made with weights"):
        pipeline.load(tmp_path, template)


def test_mistakes_are_told(finished):
    with pytest.raises(UserError, match="--layers: 'a,b'"):
        pipeline.parse_layers("a,b")
    with pytest.raises(UserError, match="--kind: 'tree'"):
        pipeline.parse_kind("tree")
    with pytest.raises(UserError, match="to 2 "):
        pipeline.run(finished, layers=(9,))

"""`calibtrain probe` on a finished run of a tiny model: what it writes, what it reuses and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import probe as pipeline
from calibtrain.pipeline.evaluate import Loaded
from tests.end_to_end.runs import finished_run
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run of a tiny model leaves that a probe needs."""
    folder = tmp_path_factory.mktemp("probe")
    sizes = {"train": 8, "calibration": 48, "temperature": 32, "certification": 8, "test": 32}
    return finished_run(folder, sizes, 4)


@pytest.fixture(scope="module")
def measured(finished):
    """What the command writes, with every other answer called right: a random model never is."""
    answer = pipeline.with_progress

    def half_right(*args):
        found = answer(*args)
        return replace(found, answers=[replace(one, correct=i % 2 == 0) for i, one in enumerate(found.answers)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "with_progress", half_right)
        done = CliRunner().invoke(cli.app, ["probe", str(finished), "--layers", "1,2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "AUROC, calibrated" in done.output
    return json.loads((finished / "probe" / "measured.json").read_text())


def test_probe_and_likelihood_are_compared_on_the_test_questions(measured, finished):
    assert measured["n"] == 32
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

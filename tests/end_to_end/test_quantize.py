"""From a finished run to a quantised artefact by the command line, and every command that takes it."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.errors import UserError
from tests.quantize_cases import few_resamples, tiny_run
from tests.tiny import write_tiny_model

REST = ["--method", "minmax", "--group-size", "32", "--samples", "16"]
SCHEME = ["--scheme", "w8a16", *REST]  # of four bits a random model's answers hardly survive


def command(*words):
    return CliRunner().invoke(cli.app, [str(one) for one in words])


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        few_resamples(patch)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("quantize"))


@pytest.fixture(scope="module")
def quantised(run):
    done = command("quantize", run, *SCHEME)
    path = run / "quantized" / "w8a16-minmax"
    certificate = json.loads((path / "calibration.json").read_text())["certificate"]
    assert done.exit_code == (0 if certificate else 1), done.output
    return path, done.output


def test_the_table_comes_before_the_artefact_and_the_path_last(quantised):
    path, output = quantised
    for part in ("held-out questions", "Accuracy", "AUROC", "Certified coverage", "Answers changed", "Size on disk"):
        assert part in output
    assert output.index("Answers changed") < output.index("written:")
    assert output.strip().splitlines()[-1] == str(path)


def test_every_command_takes_the_artefact(quantised, tmp_path):
    path = quantised[0]
    assert "What is 3?" not in command("answer", path, "What is 3?", "--uncertified").output
    assert command("answer", path, "What is 3?", "--uncertified").exit_code == 0
    assert command("certify", path, "--risk", "0.9", "--delta", "0.4").exit_code == 0
    assert command("report", path).exit_code == 0
    page = (path / "report.html").read_text()
    assert "What quantising cost" in page
    audited = tmp_path / "audited.jsonl"
    audited.write_text('{"abstained": false, "correct": true}\n' * 20)
    assert command("monitor", path, audited).exit_code in (0, 1)
    calibrated = command("calibrate", path, "--target-risk", "0.9", "--delta", "0.4")
    assert calibrated.exit_code == 0, calibrated.output
    with pytest.raises(UserError, match="is quantised already"):
        raise command("quantize", path, *SCHEME).exception


def test_a_loss_that_is_not_allowed_ends_with_3_and_no_artefact(run, tmp_path):
    done = command("quantize", run, "--scheme", "w4a16", *REST, "--keep", "changed=0", "--output", tmp_path / "small")
    assert done.exit_code == 3, done.output
    assert "refused: answers changed: " in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["small.refused"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scheme", "w2a2", "--method", "awq"], "--scheme: 'w2a2' is none of"),
        (["--scheme", "w4a16", "--method", "magic"], "--method: 'magic' is none of"),
        (["--scheme", "w8a8", "--method", "awq", "--group-size", "32"], "--group-size: w8a8 has one scale"),
        (["--scheme", "w8a8", "--method", "awq", "--observer", "mse"], "--observer: finds the one range of all tokens"),
        (["--scheme", "w8a8", "--method", "awq", "--static", "--observer", "sum"], "--observer: 'sum' is none of"),
        (["--scheme", "w4a16", "--method", "awq", "--keep", "rouge=1"], "--keep: 'rouge' is none of"),
    ],
)
def test_mistakes_are_one_line(run, words, told):
    found = command("quantize", run, *words).exception
    assert isinstance(found, UserError)
    assert told in str(found)
    assert "\n" not in str(found)


def test_a_model_that_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "hub", tied=False, hidden=64)
    rows = [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(200)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("quantize", model, "--questions", tmp_path / "q.jsonl", *SCHEME)
    assert done.exit_code in (0, 1), done.output
    assert (tmp_path / "quantized" / "w8a16-minmax" / "report.html").is_file()
    shutil.rmtree(tmp_path / "quantized")

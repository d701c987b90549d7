"""The demo takes the place of an earlier demo, of nothing else, and leaves nothing of the old model beside the new one."""

from types import SimpleNamespace

import pytest

from calibtrain import demo
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from tests.tiny import write_tiny_model


class RawModelAskedError(Exception):
    pass


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Run the demo up to the point at which it asks the raw model."""

    def asked(*_):
        raise RawModelAskedError

    monkeypatch.setattr(demo, "check", lambda *_, **__: SimpleNamespace(prepared=SimpleNamespace(splits={"test": [1]})))
    monkeypatch.setattr(demo, "ProcessPoolExecutor", asked)

    def run(name):
        with pytest.raises(RawModelAskedError):
            demo.run(RunConfig(name=name, output_dir=tmp_path))

    return run


def leave(output):
    for name in (
        "model/config.json",
        "answers/test.jsonl",
        "calibration.json",
        "probe/probe.json",
        "wandb/run",
        "notes",
    ):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    dump_config(RunConfig(name="demo", output_dir=output), output / "config.yaml")


def test_an_earlier_demo_makes_way(begin, tmp_path):
    begin("demo")
    leave(tmp_path)
    begin("demo")
    assert {path.name for path in tmp_path.iterdir()} == {"wandb", "notes", "config.yaml"}


def test_another_run_does_not(begin, tmp_path):
    leave(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"holds another run \(demo\)"):
        demo.run(RunConfig(name="mine", output_dir=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demos_own_config_has_what_it_needs(monkeypatch, tmp_path):
    def asked(*_):
        raise RawModelAskedError

    monkeypatch.setattr(demo, "ProcessPoolExecutor", asked)
    write_tiny_model(tmp_path / "tiny")
    own = [f"output_dir={tmp_path / 'out'}", f"model.source={tmp_path / 'tiny'}"]
    with pytest.raises(RawModelAskedError):
        demo.run(load_config("demo", own))
    with pytest.raises(UserError, match=r"data\.splits\.test: 0"):
        demo.run(load_config("demo", [*own, "data.splits.test=0"]))

"""A run from elsewhere starts no code that its config names, until the user says so."""

import json
import shutil
from pathlib import Path

import pytest

from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import answer, certify
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.own_code import config_of_run, named_code, trust


@pytest.fixture
def fetched(out, tmp_path, monkeypatch):
    """A run whose config names code, beside a cache that has never seen it."""
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    (out / "model" / "evil.py").write_text("raise SystemExit('the code of others ran')")
    with_override(
        out, "model.trust_remote_code=true", "task={kind: custom, grader: 'builtins:bool', extractor: 'os:system'}"
    )
    return out


def with_override(out, *overrides):
    dump_config(load_config(out / "config.yaml", list(overrides)), out / "config.yaml")


@pytest.mark.parametrize("command", [answer.load, certify.run, read_calibration])
def test_what_was_fetched_is_refused_in_one_line_before_anything_is_loaded(fetched, command):
    with pytest.raises(
        UserError, match=r"evil\.py; task\.grader: builtins:bool; task\.extractor: os:system.*calibtrain trust"
    ):
        command(fetched)


def test_trust_holds_for_this_code_alone_wherever_the_folder_goes(fetched, tmp_path_factory):
    assert len(trust(load_config(fetched / "config.yaml"), fetched)) == 3
    moved = Path(shutil.copytree(fetched, tmp_path_factory.mktemp("another") / "run"))
    assert config_of_run(moved).task.extractor == "os:system"
    (moved / "model" / "evil.py").write_text("raise SystemExit('other code ran')")
    with pytest.raises(UserError, match="calibtrain trust"):
        config_of_run(moved)


def test_code_of_the_hub_that_a_model_names_counts_by_its_name(fetched):
    (fetched / "model" / "evil.py").unlink()
    config = load_config(fetched / "config.yaml")
    before = named_code(config, fetched)
    settings = {"auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Model"}}
    (fetched / "model" / "config.json").write_text(json.dumps(settings))
    assert named_code(config, fetched) != before


def test_a_run_without_code_needs_no_word(out, tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    config = config_of_run(out)
    assert trust(config, out) == []
    assert not (tmp_path / "cache").exists()

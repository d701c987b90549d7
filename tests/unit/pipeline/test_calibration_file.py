"""calibration.json is taken whole and for what it was made of, or not at all."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from calibtrain.config_file import dump_config, load_config
from calibtrain.config_tasks import JudgeTask, ShortAnswerTask
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import read_calibration, weights_hash
from calibtrain.pipeline.scope import Scope, at_least, at_most, plain


def rewrite(out, change):
    path = out / "calibration.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


KEYS = ("calibrator", "certificate", "certification", "curve", "exceptions", "groups", "hallucination", "scope",
        "source", "parts", "answering")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_no_default(key, out):
    rewrite(out, lambda content: content.pop(key))
    with pytest.raises(UserError, match=r"calibration\.json: .*calibrate"):
        read_calibration(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", None),
        ("threshold", math.nan),
        ("threshold", -1.0),
        ("threshold", "0.5"),
        ("threshold", True),
        ("target_risk", 0.001),
        ("delta", 1e-30),
        ("delta", math.nan),
        ("n_wrong", 1000),
        ("n_wrong", -5),
        ("n_answered", 3),
        ("risk_bound", 0.5),
        ("coverage", 2),
    ],
)
def test_a_certificate_whose_numbers_do_not_prove_it_is_none(name, value, out):
    rewrite(out, lambda content: content["certificate"].update({name: value}))
    with pytest.raises(UserError, match="do not prove it"):
        read_calibration(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"calibrator": 3}', "\x00\x01"])
def test_a_file_that_is_broken_is_told(text, out):
    (out / "calibration.json").write_text(text)
    with pytest.raises(UserError, match=r"calibration\.json: cannot be read"):
        read_calibration(out)


def test_a_file_of_an_earlier_version_is_read(out):
    """It does not say what could not be set then."""
    rewrite(
        out, lambda content: [content["answering"].pop(key) for key in ("task", "code of the task", "evaluation.stop")]
    )
    read_calibration(out)


def test_a_judge_may_move():
    judges = [JudgeTask(kind="judge", judge={"url": url, "model": "m"}) for url in ("http://a/v1", "http://b/v1")]
    other = JudgeTask(kind="judge", judge={"url": "http://a/v1", "model": "other"})
    assert judges[0].grades_by() == judges[1].grades_by() != other.grades_by()


def test_it_is_void_for_other_settings_weights_or_sources(out):
    read_calibration(out)
    config = load_config(out / "config.yaml")
    longer = config.evaluation.model_copy(update={"max_new_tokens": 64})
    dump_config(config.model_copy(update={"evaluation": longer}), out / "config.yaml")
    with pytest.raises(UserError, match=r"max_new_tokens in config\.yaml was 12 then and is 64 now"):
        read_calibration(out)
    dump_config(config.model_copy(update={"task": ShortAnswerTask(match="exact_match")}), out / "config.yaml")
    with pytest.raises(UserError, match=r"task in config\.yaml was None then and is .*'exact_match'"):
        read_calibration(out)
    dump_config(config, out / "config.yaml")
    (out / "sources" / "probe").mkdir(parents=True)
    (out / "sources" / "probe" / "calibration.json").write_text((out / "calibration.json").read_text())
    with pytest.raises(UserError, match="of the source 'likelihood', not of 'probe'"):
        read_calibration(out, source="probe")
    rewrite(out, lambda content: content.update(parts={"probe/probe.json": "0" * 64}))
    with pytest.raises(UserError, match=r"probe\.json has changed since"):
        read_calibration(out)


def test_weights_are_told_apart_by_what_config_json_makes_of_them(out):
    model = out / "model"
    before = weights_hash(model)
    (model / "config.json").write_text('{"transformers_version": "6", "rope_theta": 1, "_name_or_path": "x"}')
    assert weights_hash(model) == before
    (model / "config.json").write_text('{"rope_theta": 1, "quantization_config": {"load_in_4bit": true}}')
    assert weights_hash(model) != before
    with pytest.raises(UserError, match="weights"):
        read_calibration(out)
    save_file({"w": np.zeros(3)}, model / "model.safetensors")
    assert weights_hash(model) != before


def test_a_scope_is_one_short_line_whatever_the_questions_hold():
    hostile = "a\n\x1b[31mb\u202ec " + "long " * 40
    scope = Scope(plain("x\ny.jsonl"), 1234, (plain(hostile),))
    assert str(scope).startswith("the 1,234 graded ones from x y.jsonl, such as “a [31mb c long")
    assert str(scope).isprintable()
    assert len(str(scope)) < 140


@pytest.mark.parametrize(
    ("risk", "text"), [(0.2, "20%"), (0.125, "12.5%"), (0.13742, "13.8%"), (0.07, "7%"), (1e-4, "0.1%")]
)
def test_a_bound_is_never_told_smaller_than_it_is(risk, text):
    assert at_most(risk) == text


def test_a_confidence_is_never_told_larger_than_it_is():
    assert [at_least(1 - delta) for delta in (0.05, 0.0125, 0.001, 0.4)] == ["95%", "98.7%", "99.9%", "60%"]

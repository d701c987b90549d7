"""The job around a quantiser: what it hands over, what it refuses, and that nothing is left half-written."""

import errno
import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import answer, certify, collect
from calibtrain.pipeline.calibration_file import made_by, read_calibration, weights_hash
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.quantize_full import own_answers
from calibtrain.pipeline.quantize_source import samples_of, subject_of
from calibtrain.quantization.schemes import scheme_of
from tests.quantize_cases import asked, few_resamples, noised, quantize, tiny_run
from tests.tiny import write_tiny_model


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No timing, and a quantiser of noise."""
    with pytest.MonkeyPatch.context() as patch:
        few_resamples(patch)
        patch.setattr(quantize, "speeds", lambda models, records: [1.0, 2.0])
        patch.setattr(quantize, "quantize_directory", noised)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run that every test gets a copy of."""
    return tiny_run(tmp_path_factory.mktemp("quantize"))


@pytest.fixture
def out(made, tmp_path):
    """A copy to write to."""
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture(scope="module")
def artefact(made, tmp_path_factory):
    """The run quantised once, for tests that only read."""
    out = shutil.copytree(made, tmp_path_factory.mktemp("artefact") / "out")
    return out, quantize.run(out, asked())


def never(*_args, **_named):
    raise AssertionError("the work began")


def test_the_artefact_is_whole_and_an_output_dir(artefact):
    out, found = artefact
    assert found.path == out / "quantized" / "w4a16-minmax"
    assert {path.name for path in found.path.iterdir()} == {
        "config.yaml", "model", "answers", "calibration.json", "outside.safetensors", "quantization.json", "report.html",
    }  # fmt: skip
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]
    assert {path.name for path in (found.path / "answers").iterdir()} == {
        "temperature.jsonl", "certification.jsonl", "test.jsonl", "full_test.jsonl",
    }  # fmt: skip
    assert load_config(found.path / "config.yaml").output_dir == found.path
    assert read_calibration(found.path) == found.calibrated
    assert certify.run(found.path).certification == found.calibrated.certification
    assert collect.run(found.path).is_file()
    assert answer.load(found.path, uncertified=True).answer("What is 3?").probability >= 0


def test_the_certificate_is_of_the_quantised_models_own_answers_and_never_the_old_one(artefact):
    out, found = artefact
    mark = read_measurement(found.path / "answers" / "certification.jsonl").made_by
    hashes = json.loads((found.path / "calibration.json").read_text())["calibrator"]
    assert hashes["weights_hash"] == weights_hash(found.path / "model") != weights_hash(out / "model")
    assert mark == made_by(hashes["weights_hash"], hashes["template_hash"])
    before = read_calibration(out)
    assert found.content["certificate_before"] == before.certification.certificate.as_dict()
    assert found.content["certificate_before"] != found.content["certificate"]
    copied = shutil.copytree(found.path, out.parent / "copied")
    shutil.copy(out / "calibration.json", copied / "calibration.json")
    with pytest.raises(UserError, match="weights"):  # the old file beside the new model
        read_calibration(copied)


def test_the_table_holds_what_the_answers_say(artefact):
    out, found = artefact
    full = read_measurement(out / "answers" / "test.jsonl")
    small = read_measurement(found.path / "answers" / "test.jsonl")
    table = found.content["table"]
    assert table["questions"] == 40
    assert table["rows"]["accuracy"]["before"] == full.correct.mean()
    assert table["rows"]["accuracy"]["after"] == small.correct.mean()
    assert table["changed"]["changed"] > 0
    assert {"disk_bytes", "held_bytes", "tokens_per_second"} <= found.content["cost"]["after"].keys()
    assert found.content["quantization"]["samples"] == 16


def test_what_is_quantised_by_is_prompts_with_the_models_own_answers(made):
    from calibtrain.pipeline.evaluate import Loaded

    config = load_config(made / "config.yaml")
    loaded, records = Loaded(config, made / "model"), prepare(config).splits["calibration"][:5]
    answered = loaded.answer(records)
    for text, record, said in zip(own_answers(loaded, records), records, answered.answers, strict=True):
        assert list(text.prompt) == loaded.template.prompt_ids(record)
        assert loaded.template.decode_answer(text.answer) == said.text
        assert len(text.answer) == len(said.token_logprobs)


def test_answers_in_full_precision_are_made_once_and_only_where_they_are_not_known(out, monkeypatch):
    asked_of, answers = [], out / "answers" / "test.jsonl"
    measure = quantize.Loaded.measure

    def counted(self, records, *rest):
        asked_of.append(len(records))
        return measure(self, records, *rest)

    monkeypatch.setattr(quantize.Loaded, "measure", counted)
    quantize.run(out, asked())
    assert asked_of == [40, 30, 60, 40]  # full precision: test alone, the others are calibrate's
    asked_of.clear()
    quantize.run(out, asked(method="awq"))
    assert asked_of == [30, 60, 40]
    lines = answers.read_text().replace(read_measurement(answers).made_by, "0" * 16)
    answers.write_text(lines)  # of other weights
    asked_of.clear()
    quantize.run(out, asked(method="awq"))
    assert asked_of == [40, 30, 60, 40]


def test_too_great_a_loss_is_refused_and_leaves_what_was_measured(out):
    found = quantize.run(out, asked(keep={"changed": 0.0, "accuracy": 1.0}))
    assert found.path is None
    assert not (out / "quantized" / "w4a16-minmax").exists()
    assert [path.name for path in (out / "quantized").iterdir()] == ["w4a16-minmax.refused"]
    refused = out / "quantized" / "w4a16-minmax.refused" / "quantization.json"
    assert [path.name for path in refused.parent.iterdir()] == ["quantization.json"]
    content = json.loads(refused.read_text())
    assert [(one["key"], one["kept"]) for one in content["keep"]] == [("changed", False), ("accuracy", True)]
    share = content["table"]["rows"]["changed"]["after"]
    assert found.refusal.startswith(f"refused: answers changed: {100 * share:.1f}% (")
    assert "allowed 0.0%. Next to try: --method " in found.refusal
    assert str(refused) in found.refusal
    assert quantize.run(out, asked(keep={"changed": 1.0})).path.is_dir()
    assert [path.name for path in (out / "quantized").iterdir()] == ["w4a16-minmax"]


def test_a_refusal_leaves_an_earlier_artefact_alone(out):
    first = quantize.run(out, asked())
    second = quantize.run(out, asked(keep={"changed": 0.0}))
    assert second.path is None
    assert second.refusal.endswith("stays as it was")
    assert read_calibration(first.path) == first.calibrated


def test_without_a_certificate_the_artefact_is_written_and_says_so(out):
    config = out / "config.yaml"
    config.write_text(re.sub("target_risk: [0-9.]+", "target_risk: 0.01", config.read_text()))
    calibration = json.loads((out / "calibration.json").read_text())
    (out / "calibration.json").write_text(json.dumps(calibration | {"certificate": None}))
    found = quantize.run(out, asked())
    assert found.calibrated.failures
    assert found.content["certificate"] is None
    page = (found.path / "report.html").read_text()
    assert "No certificate could be earned" in page
    assert not answer.load(found.path).answer("What is 3?").certified


def test_an_interrupted_run_goes_on_where_it_was(out, monkeypatch):
    monkeypatch.setattr(quantize, "speeds", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize.run(out, asked())
    work = out / "quantized" / "w4a16-minmax.partial"
    assert work.is_dir()
    assert not (out / "quantized" / "w4a16-minmax").exists()
    monkeypatch.undo()
    monkeypatch.setattr(quantize, "quantize_directory", never)
    monkeypatch.setattr(quantize, "with_progress", never)
    found = quantize.run(out, asked())
    assert found.path.is_dir()
    assert not work.exists()


def test_another_method_begins_anew_in_what_an_interrupted_run_left(out, monkeypatch):
    monkeypatch.setattr(quantize, "speeds", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize.run(out, asked(output=out / "small"))
    monkeypatch.undo()
    seen = []

    def spied(source, target, texts, settings, *, on_block):
        seen.append(settings.method)
        return noised(source, target, texts, settings, on_block=on_block)

    monkeypatch.setattr(quantize, "quantize_directory", spied)
    assert quantize.run(out, asked(output=out / "small", method="awq")).path == out / "small"
    assert seen == ["awq"]


@pytest.mark.parametrize(
    ("changes", "alpha"), [({}, 0.8), ({"rotate": True}, 0.5), ({"rotate": True, "alpha": 0.3}, 0.3)]
)
def test_a_rotated_model_is_smoothed_less_unless_it_is_said(out, changes, alpha):
    wanted = asked(**changes)
    settings = quantize._settings(subject_of(out, wanted), wanted)
    assert (settings.alpha, settings.rotate) == (alpha, wanted.rotate)


def stop(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("quantize_directory", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("write_calibration", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_half_written(out, monkeypatch, place, error):
    def full(*_args, **_named):
        raise error

    monkeypatch.setattr(quantize, place, full)
    with pytest.raises(UserError, match="no space left on the disk, and nothing is written to") as raised:
        quantize.run(out, asked())
    assert "\n" not in str(raised.value)
    assert not (out / "quantized" / "w4a16-minmax").exists()


def test_models_that_do_not_fit_beside_each_other_are_timed_one_after_the_other(out, monkeypatch):
    seen = []
    monkeypatch.setattr(quantize, "has_room", lambda model: False)
    monkeypatch.setattr(quantize, "speeds", lambda models, records: seen.append(len(models)) or [float(len(seen))])
    costs = quantize.run(out, asked()).content["cost"]
    assert seen == [1, 1]
    assert (costs["before"]["tokens_per_second"], costs["after"]["tokens_per_second"]) == (2.0, 1.0)
    assert costs["alternating"] is False


def test_what_the_quantiser_refuses_leaves_nothing(out, monkeypatch):
    def refuses(*_args, **_named):
        raise UserError("--ignore: no layer is called 'x_proj'")

    monkeypatch.setattr(quantize, "quantize_directory", refuses)
    with pytest.raises(UserError, match="x_proj"):
        quantize.run(out, asked())
    assert not any((out / "quantized").iterdir())


def test_a_layer_that_is_none_is_told_before_the_work(out, monkeypatch):
    monkeypatch.setattr(quantize, "full_precision", never)
    with pytest.raises(UserError, match="--ignore: no layer is called 'x_proj'; there are q_proj"):
        quantize.run(out, asked(ignore=("x_proj",)))
    assert not (out / "quantized").exists()


def test_a_disk_without_room_is_told_before_the_work(out, monkeypatch):
    monkeypatch.setattr(quantize, "full_precision", never)
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(UserError, match=r"0\.0 GB free, and a w4a16 copy of .* may need 0\.1 GB"):
        quantize.run(out, asked())
    assert not (out / "quantized").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "--method: 'magic' is none of minmax, smoothquant, awq, preserve"),
        ({"samples": None}, "24 calibration questions, and 128 to 512 are usual: .* say --samples 24"),
        ({"samples": 25}, "--samples: 25 asked for, and the calibration split has 24"),
        ({"samples": 3}, "--samples: 3 is not between 16 and 512"),
        ({"template": "chat"}, "go with a Hugging Face directory"),
    ],
)
def test_what_is_wrong_is_told_before_the_work(out, monkeypatch, changes, words):
    monkeypatch.setattr(quantize, "full_precision", never)
    with pytest.raises(UserError, match=words):
        quantize.run(out, asked(**changes))
    assert not (out / "quantized").exists()


def test_too_few_questions_to_quantise_by_at_all():
    with pytest.raises(UserError, match="9 calibration questions are too few"):
        samples_of(None, 9)
    assert [samples_of(None, n) for n in (128, 200, 256, 512)] == [128, 200, 256, 256]


def test_an_already_quantised_model_is_refused(out, artefact):
    with pytest.raises(UserError, match="is quantised already"):
        quantize.run(artefact[1].path, asked())
    settings = out / "model" / "config.json"
    known = {"quantization_config": {"quant_method": "compressed-tensors"}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | known))
    with pytest.raises(UserError, match=r"is quantised already \(compressed-tensors\)"):
        quantize.run(out, asked())


def test_a_run_that_is_not_calibrated_is_told_how(out):
    (out / "calibration.json").unlink()
    with pytest.raises(UserError, match=re.escape(f"run `calibtrain calibrate {out}`")):
        quantize.run(out, asked())


def test_a_place_that_is_taken_is_left_as_it_is(out, made):
    target = out / "quantized" / "w4a16-minmax"
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no quantised model of calibtrain"):
        quantize.run(out, asked())
    assert (target / "mine.txt").read_text() == "mine"
    (target / "quantization.json").write_text(json.dumps({"source_hash": "0" * 64}))
    with pytest.raises(UserError, match="a quantised model of other weights than"):
        quantize.run(out, asked())
    with pytest.raises(UserError, match="is what is quantised"):
        quantize.run(out, asked(output=out))


def test_the_same_command_again_replaces_its_own_artefact(out, caplog):
    with caplog.at_level(logging.WARNING):
        first = quantize.run(out, asked())
    assert "16 calibration questions: with fewer than 128" in caplog.text
    (first.path / "left_over").write_text("")
    second = quantize.run(out, asked())
    assert second.path == first.path
    assert not (first.path / "left_over").exists()
    assert [path.name for path in (out / "quantized").iterdir()] == ["w4a16-minmax"]
    for other, words in (({"rotate": True}, "rotate: False"), ({"samples": 20}, "samples: 16")):
        with pytest.raises(UserError, match=rf"was made otherwise \(.*{words}.*give another --output"):
            quantize.run(out, asked(output=first.path, **other))


def test_what_makes_another_artefact_has_a_folder_of_its_own():
    plain = replace(asked(), scheme=scheme_of("w8a8"))
    static = [scheme_of("w8a8", static=True, observer=one) for one in (None, "mse")]
    names = [plain.name, replace(plain, rotate=True).name, *(replace(plain, scheme=one).name for one in static)]
    names.append(replace(plain, scheme=scheme_of("w8a8", static=True, kv_cache=True), rotate=True).name)
    assert names == [f"w8a8-minmax{more}" for more in ("", "-rotated", "-static", "-static-mse", "-static-kv8-rotated")]


def test_the_promise_is_the_runs_certificate_and_not_its_configs(out):
    certify.run(out, risk=0.6, delta=0.2)
    found = quantize.run(out, replace(asked(), scheme=scheme_of("w8a8"), method="smoothquant"))
    assert found.path.name == "w8a8-smoothquant"
    assert (found.content["table"]["risk"], found.content["table"]["delta"]) == (0.6, 0.2)
    assert found.content["certificate"]["target_risk"] == 0.6


def test_any_model_with_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "hub", hidden=64)
    rows = [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(200)]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = quantize.run(model, asked(questions=file, template="plain"))
    assert found.path == tmp_path / "quantized" / "w4a16-minmax"
    config = load_config(found.path / "config.yaml")
    assert (config.data.template, config.model.source) == ("plain", str(model))
    sizes = config.data.splits.model_dump()
    assert sizes.pop("train") == 0
    assert sum(sizes.values()) == 200
    assert {path.name for path in model.iterdir()}.isdisjoint({"answers", "quantized"})
    kept = tmp_path / "quantized" / "answers"
    assert {path.name for path in kept.iterdir()} == {"test.jsonl", "temperature.jsonl", "certification.jsonl"}
    assert collect.run(found.path).is_file()
    assert quantize.run(model, asked(questions=file, output=tmp_path / "chat")).path == tmp_path / "chat"
    assert load_config(tmp_path / "chat" / "config.yaml").data.template == "chat"  # the tokenizer has one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give graded questions with --questions"),
        ({"questions": "nowhere.jsonl"}, "--questions: no such file"),
        (
            {"questions": "few.jsonl"},
            r"holds 20 questions with accepted answers \(calibration \d+, .*about 128 questions",
        ),
        ({"questions": "few.jsonl", "template": "fancy"}, "--template: 'fancy' is neither plain nor chat"),
    ],
)
def test_any_model_with_bad_questions(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(quantize, "full_precision", never)
    model = write_tiny_model(tmp_path / "hub")
    rows = [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(20)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {key: tmp_path / one if key == "questions" else one for key, one in changes.items()}
    with pytest.raises(UserError, match=words):
        quantize.run(model, asked(**named))

"""Sources of confidence at work, on a tiny model's run: fitted, calibrated, certified, loaded and asked."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import calibtrain
from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import confidence, probe, source
from tests.end_to_end.runs import finished_run
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = ["What is 900?", "What is 901?", "What is 902?"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with probes; three of four answers are called right, since a random model's never is."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"train": 8, "calibration": 48, "temperature": 40, "certification": 80, "test": 24}
    output = finished_run(folder, sizes, 3)
    asked, fitted = confidence.answer_questions, probe.with_progress

    def mostly_right(found):
        return replace(found, answers=[replace(one, correct=i % 4 > 0) for i, one in enumerate(found.answers)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confidence, "answer_questions", lambda *args, **more: mostly_right(asked(*args, **more)))
        patch.setattr(probe, "with_progress", lambda *args: mostly_right(fitted(*args)))
        probe.run(output, layers=(1, 2))
        for name in ("probe", "p_ik", "ensemble"):
            command = ["calibrate", str(output), "--source", name, "--target-risk", "0.7"]
            done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
            assert done.exit_code == 0, done.output
        kept = {path: path.read_bytes() for path in (output / "sources").rglob("*.json")}
        for name in ("probe", "ensemble"):
            failing = ["calibrate", str(output), "--source", name, "--target-risk", "0.001"]
            done = CliRunner().invoke(cli.app, failing, catch_exceptions=False)
            assert done.exit_code == 1, done.output
        assert {path: path.read_bytes() for path in (output / "sources").rglob("*.json")} == kept
    return output


@pytest.mark.parametrize("name", ["probe", "p_ik", "ensemble"])
def test_a_source_is_served_with_its_own_calibrator_and_certificate(finished, name):
    kept = json.loads((finished / "sources" / name / "calibration.json").read_text())
    assert kept["source"] == name
    answerer = calibtrain.load(finished, source=name)
    replies = answerer.answers(QUESTIONS)
    plain = answerer.loaded.answer([answerer._record(question) for question in QUESTIONS])
    assert [reply.text for reply in replies] == [one.text for one in plain.answers]
    found = answerer.scorer.score(confidence.asker_of(answerer.loaded), plain_records(answerer), plain)
    assert [reply.probability for reply in replies] == pytest.approx(answerer.calibrated.calibrator.apply(found.values))
    assert {reply.source for reply in replies} == {name}
    assert all(reply.forward_passes == 1 for reply in replies)  # all probes of an ensemble share one pass
    assert all(reply.tokens_read > reply.prompt_tokens for reply in replies)
    assert replies[0].certificate == answerer.calibrated.certification.certificate
    said = CliRunner().invoke(cli.app, ["answer", str(finished), QUESTIONS[0], "--source", name])
    assert said.exit_code == 0, said.output


def plain_records(answerer):
    return [answerer._record(question) for question in QUESTIONS]


def test_scores_in_service_are_those_that_were_calibrated(finished):
    """The same questions, asked in service and by `calibrate`: no other pass, prompt or layer."""
    answerer = calibtrain.load(finished, source="ensemble")
    config = load_config(finished / "config.yaml")
    records = source.prepare(config).splits["certification"]
    fingerprint = answerer.scorer.fingerprint
    names = [name for name in answerer.scorer.members if name not in source.PROBES]
    asker = confidence.asker_of(answerer.loaded)
    kept = confidence.score_split(
        asker, records, finished / "confidence" / "work" / "certification", names, fingerprint
    )
    kept = confidence.with_probes(kept, asker, records, answerer.scorer.probes, fingerprint)
    expected = answerer.scorer.ensemble.score({name: one.values for name, one in kept.scores.items()})
    replies = answerer.answers([record.question for record in records[:20]])
    calibrated = answerer.calibrated.calibrator.apply(expected[:20])
    np.testing.assert_allclose([reply.probability for reply in replies], calibrated, atol=1e-4)


def test_chances_are_told_before_any_answer_is_made(finished, monkeypatch):
    answerer = calibtrain.load(finished, source="p_ik")
    expected = [reply.probability for reply in answerer.answers(QUESTIONS)]
    monkeypatch.setattr(answerer.loaded, "answer", None)
    monkeypatch.setattr("calibtrain.pipeline.evaluate.answer_questions", None)
    assert answerer.foresee(QUESTIONS) == pytest.approx(expected, abs=1e-5)
    assert answerer.foresee([]) == []
    with pytest.raises(UserError, match='source="p_ik"'):
        calibtrain.load(finished, source="probe").foresee(QUESTIONS)


def test_what_was_not_calibrated_or_is_of_other_weights_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="p_true is not calibrated; run `calibtrain calibrate"):
        calibtrain.load(finished, source="p_true")
    with pytest.raises(UserError, match="'trust_me' is none of"):
        calibtrain.load(finished, source="trust_me")
    for arguments, words in (
        ({"name": "likelihood"}, "without --source"),
        ({"name": "nothing"}, "'nothing' is none of"),
        ({"name": "probe", "members": ["p_true"]}, "--of: names the members"),
        ({"name": "ensemble", "members": ["p_true", "vibes"]}, "'vibes' is none of"),
    ):
        with pytest.raises(UserError, match=words):
            source.run(finished, **arguments)
    probe_json = finished / "probe" / "probe.json"
    whole = probe_json.read_text()
    try:  # fitted anew, for the same model: its scores are others
        probe_json.write_text(whole + "\n")
        for name in ("probe", "ensemble"):
            with pytest.raises(UserError, match=r"probe\.json has changed since"):
                calibtrain.load(finished, source=name)
    finally:
        probe_json.write_text(whole)
    for name in ("probe", "sources", "config.yaml"):
        (tmp_path / name).symlink_to(finished / name)
    tiny_model(len(tiny_tokenizer()), seed=1, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("probe", "ensemble"):
        with pytest.raises(UserError, match="made with weights"):
            calibtrain.load(tmp_path, source=name)

"""Questions outside, from calibration to what a reply says: on a tiny model whose answers are certified by hand."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.certificate import certify as certify_threshold
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.outside import ALPHA, Outside
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate, certify, outside
from calibtrain.pipeline.answer import load
from calibtrain.pipeline.calibration_file import file_hash
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.promise import ELSEWHERE, TOLD, UNLIKE
from calibtrain.pipeline.reply import REFUSAL
from tests.end_to_end.runs import finished_run

SIZES = {"train": 8, "calibration": 8, "temperature": 60, "certification": 120, "test": 120}
STRANGE = "unknown unknown unknown France France the the of of in a a a What What ???"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A calibrated run of a model with random weights, nearly all of whose answers are called right."""
    output = finished_run(tmp_path_factory.mktemp("outside"), SIZES, 6)
    with (output / "config.yaml").open("a") as file:
        file.write("\ntask: {kind: short_answer, match: exact_match}\n")  # it says nothing but signs
    rows = (output.parent / "questions.jsonl").read_text().splitlines()
    said = {one.question: one.text for one in Loaded(load_config(output / "config.yaml"), output / "model").measure(
        [record for split in ("temperature", "certification", "test")
         for record in prepare(load_config(output / "config.yaml")).splits[split]]).answers}  # fmt: skip
    graded = []
    for number, row in enumerate(map(json.loads, rows)):
        right = said.get(row["question"]) if number % 20 else None
        graded.append(row | {"answers": [right or "unknown"]})
    (output.parent / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    calibrate.run(output)
    return output


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def with_mode(out, mode):
    path = out / "config.yaml"
    path.write_text(path.read_text() + f"\nabstention: {{outside: {mode}, target_risk: 0.2}}\n")
    return out


def test_the_states_are_those_of_generation_and_of_a_pass_over_the_prompts(finished):
    config = load_config(finished / "config.yaml")
    loaded, records = Loaded(config, finished / "model"), prepare(config).splits["test"][:20]
    states = loaded.measure(records).states
    assert states.shape == (20, loaded.model.policy.causal_model.config.hidden_size)
    assert states == pytest.approx(outside.states_of(loaded, records), abs=1e-4)


def test_calibration_keeps_a_detector_that_tells_strange_questions_and_few_others(finished):
    content = json.loads((finished / "calibration.json").read_text())
    assert content["outside"] == {"n": 120, "alpha": ALPHA, "reason": ""}
    assert content["parts"] == {outside.FILE: file_hash(finished / outside.FILE)}
    test = [record.question for record in prepare(load_config(finished / "config.yaml")).splits["test"]]
    answerer = load(finished)
    replies = answerer.answers([*test, STRANGE])
    assert sum(reply.unlike for reply in replies[:-1]) / len(test) < ALPHA + 4 * np.sqrt(ALPHA / len(test))
    assert replies[-1].unlike
    assert all(reply.forward_passes == 0 for reply in replies)
    # Held-out questions are told as later ones are.
    kept = read_measurement(finished / "answers" / "certification.jsonl").answers
    assert sum(one.outside < ALPHA for one in kept) == 5  # 6.05 - 1 of 120


def test_what_is_told_of_a_strange_question_promises_nothing(finished):
    answerer = load(finished)
    like = next(reply for reply in answerer.answers([f"What is {i}?" for i in range(300, 340)]) if not reply.unlike)
    assert like.certified
    assert TOLD in like.limit
    assert "Certified for" in like.told()
    strange = answerer.answer(STRANGE)
    assert strange.told().startswith(UNLIKE)
    assert "Certified for" not in strange.told()
    assert (strange.certified, strange.certificate, strange.risk) == (False, None, None)
    assert strange.silence == UNLIKE
    assert "for questions like the 120 graded ones" in strange.limit
    assert "as measured on other questions" in strange.sentence


def test_abstaining_is_certified_on_the_questions_that_are_not_told(out):
    found = calibrate.run(with_mode(out, "abstain"))
    assert found.scope.n == 115
    answerer = load(out)
    strange = answerer.answer(STRANGE)
    assert (strange.abstained, strange.spoken, strange.threshold) == (True, REFUSAL, None)
    assert strange.told().splitlines()[:2] == [UNLIKE, REFUSAL]
    again = certify.run(out)
    assert again.certification.certificate == found.certification.certificate
    # Whoever runs the model may allow it.
    assert not load(out, uncertified=True).answer(STRANGE).abstained or strange.probability < answerer.default.threshold


def test_ignoring_looks_at_nothing(out):
    calibrate.run(with_mode(out, "ignore"))
    assert not (out / outside.FILE).exists()
    reply = load(out).answer(STRANGE)
    assert (reply.outside, reply.unlike, reply.silence) == (None, False, "")
    assert ELSEWHERE in reply.limit


def test_a_detector_that_is_gone_or_changed_or_anothers_is_refused(out):
    path, kept = out / outside.FILE, (out / outside.FILE).read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"outside.safetensors has changed since; run `calibtrain calibrate"):
        load(out)
    other = Outside.load(finished_detector(out, kept), Fingerprint(*fingerprint(out)))
    Outside(
        other.mean, other.directions, other.precision, other.rest, other.held_out, Fingerprint("x" * 64, "y" * 64)
    ).save(path)
    content = json.loads((out / "calibration.json").read_text())
    content["parts"] = {outside.FILE: file_hash(path)}
    (out / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="made with weights xxxx"):
        load(out)


def finished_detector(out, content):
    path = out / "kept.safetensors"
    path.write_bytes(content)
    return path


def fingerprint(out):
    fitted = json.loads((out / "calibration.json").read_text())["calibrator"]
    return fitted["weights_hash"], fitted["template_hash"]


def test_a_calibration_of_an_earlier_version_answers_as_it_did(out):
    content = json.loads((out / "calibration.json").read_text())
    for key in ("outside", "shapes"):
        del content[key]
    content["parts"] = {}
    (out / "calibration.json").write_text(json.dumps(content))
    reply = load(out).answer("What is 1?")
    assert (reply.outside, reply.certified) == (None, True)
    assert ELSEWHERE in reply.limit


def test_another_source_takes_the_runs_detector(finished):
    facts, parts, known = outside.of_run(finished, Fingerprint(*fingerprint(finished)))
    assert facts["outside"]["n"] == len(known) == 120
    assert list(parts) == [outside.FILE]
    facts, parts, known = outside.of_run(finished, Fingerprint("x", "y"))
    assert (facts["outside"]["n"], parts, known) == (0, {}, {})


def test_a_certificate_of_the_questions_that_are_not_told_holds_for_later_ones_that_are_not():
    """By simulation: the stranger a question, the more often its answer is wrong, at any confidence."""
    rng, delta, broken, made = np.random.default_rng(0), 0.1, 0, 0
    blank = Outside(np.zeros(1), np.ones((1, 1)), np.ones(1), 0.0, np.zeros(0), Fingerprint("w", "t"))

    def drawn(n):
        states, confidence = rng.exponential(1, (n, 1)), rng.uniform(0.5, 1, n)
        return states, confidence, rng.random(n) < confidence * np.exp(-0.15 * states[:, 0])

    later_states, later_confidence, later_right = drawn(100_000)
    for _ in range(200):
        states, confidence, right = drawn(300)
        detector = replace(blank, held_out=np.sort(blank.scores(states)))
        answers = [Answer(str(i), "?", "a", (0.0,), outside=p) for i, p in enumerate(detector.p_values(states))]
        kept = outside.inside(answers)
        assert len(kept) == 286  # a p-value below 0.05 needs a score above 15 others'
        found = certify_threshold(confidence[kept], right[kept], 0.3, delta).certificate
        if found is None:
            continue
        given = (detector.p_values(later_states) >= ALPHA) & (later_confidence >= found.threshold)
        made += 1
        broken += (~later_right[given]).mean() > 0.3
    assert made > 50
    assert broken / 200 <= delta + 3 * np.sqrt(delta * (1 - delta) / 200)

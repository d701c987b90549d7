"""A served model measured, calibrated, certified and asked; the server is a small fake one that says what it is told."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import engine, evaluate, served
from calibtrain.pipeline.answer import load
from calibtrain.pipeline.measurement import read_measurement
from tests.end_to_end.runs import finished_run
from tests.tiny import tiny_tokenizer
from tests.unit.engines.fake import FakeModel, serve

SIZES = {"train": 8, "calibration": 48, "temperature": 60, "certification": 120, "test": 24}
TOKENIZER = tiny_tokenizer()


def knows(prompt):
    """Whether it knows the answer: to three questions of four, which it is sure of."""
    numbers = re.findall(r"What is (\d+)", TOKENIZER.decode(prompt))
    return not numbers or int(numbers[-1]) % 4 > 0


def fake_model():
    def answer_of(prompt):
        words = TOKENIZER(" unknown" if knows(prompt) else " France", add_special_tokens=False)["input_ids"]
        return [*words, TOKENIZER.eos_token_id]

    return FakeModel(
        answer_of,
        decode=TOKENIZER.decode,
        logprob=lambda body: -0.02 if knows(body["prompt"]) else -0.3,
        name="org/fake model",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("engine"), SIZES, 24)


@pytest.fixture
def out(finished, tmp_path):
    for name in ("model", "config.yaml"):
        (tmp_path / name).symlink_to(finished / name)
    return tmp_path


@pytest.fixture(scope="module")
def calibrated(finished):
    """The run with a calibration of the fake engine, and what was said of it."""
    with serve(fake_model()) as url:
        said = command("calibrate", finished, "--engine", url, "--target-risk", "0.2")
        assert url not in "".join(path.read_text() for path in (finished / "engines").rglob("*.json"))
    return finished, said


@pytest.fixture
def certified(calibrated, out):
    """A copy of it: the same model behind another address is the same engine."""
    shutil.copytree(calibrated[0] / "engines", out / "engines")
    return out


@pytest.fixture
def fake():
    one = fake_model()
    with serve(one) as url:
        one.url = url
        yield one


def command(*arguments, code=0):
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_a_served_model_is_measured_by_its_logprobs(out, fake, tmp_path):
    path = tmp_path / "answers.jsonl"
    said = command("evaluate", out / "config.yaml", "--engine", fake.url, "--model", out / "model", "--output", path)
    assert "org/fake model at http://127.0.0.1" in " ".join(said.split())
    measured = read_measurement(path)
    assert len(measured.answers) == SIZES["test"]
    assert {one.text for one in measured.answers} == {"unknown", "France"}
    assert all(one.correct == (one.text == "unknown") and one.finished for one in measured.answers)
    for one in measured.answers:
        each = -0.02 if one.correct else -0.3
        assert one.token_logprobs == (each,) * len(one.tokens)  # the end token's too
        assert one.tokens[-1] == ""
    config = load_config(out / "config.yaml")
    assert measured.made_by == served.Served(config, out / "model", url=fake.url).mark()
    fake.name = "org/other"
    assert measured.made_by != served.Served(config, out / "model", url=fake.url).mark()


def test_the_starting_model_is_shown_examples_and_a_served_export_is_not(out, fake):
    command("evaluate", out / "config.yaml", "--engine", fake.url)
    shown = fake.requests[-1]["prompt"]
    command("evaluate", out / "config.yaml", "--engine", fake.url, "--model", out / "model")
    assert len(shown) > len(fake.requests[-1]["prompt"])


def test_it_is_monitored_by_its_own_certificate(certified, fake, tmp_path):
    log = tmp_path / "audited.jsonl"
    log.write_text('{"abstained": false, "correct": true}\n' * 40)
    command("monitor", certified, log, "--engine", fake.url)
    folder = next((certified / "engines").iterdir())
    assert json.loads((folder / "monitor.json").read_text())["n"] == 40
    assert not (certified / "monitor.json").exists()
    log.write_text(log.read_text() + '{"abstained": false, "correct": false}\n' * 100)
    assert "ALARM at given answer" in command("monitor", certified, log, "--engine", fake.url, code=1)
    with pytest.raises(UserError, match="--source head: a server returns log-probs alone"):
        command("monitor", certified, log, "--engine", fake.url, "--source", "head")
    with pytest.raises(UserError, match="--engine-model: goes with --engine"):
        command("monitor", certified, log, "--engine-model", "fake model")


def test_it_is_calibrated_certified_and_asked_under_its_own_certificate(calibrated, certified, fake):
    out, said = certified, calibrated[1]
    assert "platt: " in said
    assert "certified: answering" in said
    assert not (calibrated[0] / "calibration.json").exists()  # the run's own stays as it is
    folder = next((out / "engines").iterdir())
    assert folder.name.startswith("fake-model-")
    content = json.loads((folder / "calibration.json").read_text())
    assert content["source"] == "engine"
    assert "questions unlike the graded ones cannot be told: a server returns no hidden states" in " ".join(
        said.split()
    )
    assert content["outside"]["n"] == 0
    assert content["engine"]["model"] == "org/fake model"
    assert sorted(path.name for path in (folder / "answers").iterdir()) == ["certification.jsonl", "temperature.jsonl"]
    known, unknown = (command("answer", out, f"What is {number}?", "--engine", fake.url) for number in (901, 904))
    assert known.startswith("Certified for questions like the 120 graded ones")
    assert "unknown  (" in known
    assert "I do not know. (best guess at" in unknown
    answerer = load(out, engine=fake.url)
    replies = answerer.answers(["What is 901?", "What is 904?"])
    assert [one.abstained for one in replies] == [False, True]
    assert replies[0].certificate == answerer.calibrated.certification.certificate
    assert replies[0].probability > 0.9 > 0.5 > replies[1].probability


def test_another_engine_behind_the_address_is_refused(certified, fake):
    out = certified
    answerer = load(out, engine=fake.url)
    answer_of, fingerprint, logprob = fake.answer_of, fake.fingerprint, fake.logprob
    fake.logprob = lambda body: logprob(body) - 0.1  # other weights, or fewer bits, under the same name
    with pytest.raises(UserError, match=r"another engine than the one that was measured: its log-probs .* calibrate"):
        command("answer", out, "What is 901?", "--engine", fake.url)
    answerer.loaded._seen -= 2 * served.STALE  # one that has been up for long looks again
    with pytest.raises(UserError, match="another engine than the one"):
        answerer.answer("What is 901?")
    fake.logprob, fake.fingerprint = logprob, "fake-2"
    with pytest.raises(UserError, match="its system_fingerprint was fake-1 then and is fake-2 now"):
        load(out, engine=fake.url)
    with pytest.raises(UserError, match="another model or server answers now"):
        answerer.answer("What is 901?")
    fake.fingerprint, fake.name = fingerprint, "another"
    with pytest.raises(UserError, match="the engine is not calibrated; run `calibtrain calibrate"):
        load(out, engine=fake.url)
    assert fake.answer_of is answer_of


def test_what_the_calibration_rests_on_may_not_change(certified, fake, finished):
    out = certified
    path = next((out / "engines").iterdir()) / "calibration.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["engine"]["probes"][0]["logprobs"][0] -= 0.001
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="fitted with weights"):
        load(out, engine=fake.url)
    path.write_text(whole[:200])
    with pytest.raises(UserError, match="cannot be read"):
        load(out, engine=fake.url)
    path.write_text(whole)
    (out / "config.yaml").unlink()
    changed = (finished / "config.yaml").read_text().replace("max_new_tokens: 24", "max_new_tokens: 12")
    (out / "config.yaml").write_text(changed)
    with pytest.raises(UserError, match=r"max_new_tokens in config\.yaml was 24 then and is 12 now"):
        load(out, engine=fake.url)


def test_a_certificate_stays_where_the_new_calibration_has_none(certified, fake):
    out = certified
    kept = {path: path.read_bytes() for path in (out / "engines").rglob("*.json*")}
    said = command("calibrate", out, "--engine", fake.url, "--target-risk", "0.0001", code=1)
    assert "nothing is written" in said
    assert {path: path.read_bytes() for path in (out / "engines").rglob("*.json*")} == kept


def test_an_engine_that_changes_while_it_is_calibrated_certifies_nothing(out, fake, monkeypatch):
    measure = evaluate.with_progress

    def then_change(*arguments, **options):
        found = measure(*arguments, **options)
        fake.logprob = lambda body: -0.2
        return found

    monkeypatch.setattr(evaluate, "with_progress", then_change)
    with pytest.raises(UserError, match="another engine than the one that was measured"):
        engine.run(out, url=fake.url)
    assert not list((out / "engines").rglob("calibration.json"))


def test_a_server_of_another_tokenizer_is_refused(out, fake):
    fake.decode = lambda ids: "".join(chr(97 + one % 26) for one in ids)
    with pytest.raises(UserError, match="the server's tokenizer is another one: what it reads as"):
        command("calibrate", out, "--engine", fake.url)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "CONFIG", "--engine-model", "a"), "--engine-model: goes with --engine"),
        (("evaluate", "CONFIG", "--engine", "URL", "--force"), "--force: needs the model itself"),
        (("calibrate", "OUT", "--engine", "URL", "--source", "p_true"), "a server returns log-probs alone"),
        (("answer", "OUT", "Which?", "--engine", "URL", "--source", "probe"), "a server returns log-probs alone"),
        (
            ("answer", "OUT", "Which?", "--engine", "URL", "--engine-model", "b"),
            "serves no 'b'; it serves: org/fake model",
        ),
    ],
)
def test_what_does_not_go_together_is_told(out, fake, arguments, words):
    places = {"OUT": out, "CONFIG": out / "config.yaml", "URL": fake.url}
    with pytest.raises(UserError, match=words):
        command(*(places.get(one, one) for one in arguments))


def test_a_control_token_in_a_question_is_refused_before_it_is_sent(certified, fake):
    out = certified
    answerer = load(out, engine=fake.url)
    before = len(fake.requests)
    with pytest.raises(UserError, match="control token"):
        answerer.answer("What is 1?<|im_end|>")
    assert len(fake.requests) == before

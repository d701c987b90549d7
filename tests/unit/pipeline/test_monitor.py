"""The alarm over an audit log that grows: each line counts once, whatever the calls, and a bad line counts nothing."""

import json
import math
import random

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.abstention.monitor import RiskAlarm
from calibtrain.errors import UserError
from calibtrain.pipeline import certify, monitor


def rows(n, risk, refused=0.25, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        abstained = rng.random() < refused
        found.append({"abstained": abstained, "correct": None if abstained else rng.random() >= risk})
    return found


def log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_log_read_in_parts_is_the_log_read_at_once(out, tmp_path):
    audited = rows(600, 0.08)
    for end in (1, 200, 200, 431, 600):
        service = monitor.run(out, log(tmp_path / "audit.jsonl", audited[:end]))
    given = [row for row in audited if not row["abstained"]]
    whole = RiskAlarm(service.alarm.target_risk, service.alarm.delta)
    whole.observe_all(not row["correct"] for row in given)
    assert service.alarm.as_dict() == whole.as_dict()
    assert (service.n, service.n_new) == (600, 169)
    assert service.refusal_rate == (600 - len(given)) / 600
    assert service.hallucination_rate == sum(not row["correct"] for row in given) / 600


def test_a_log_may_go_on_in_another_file(out, tmp_path):
    monitor.run(out, log(tmp_path / "monday.jsonl", rows(50, 0.05)))
    assert monitor.run(out, log(tmp_path / "tuesday.jsonl", rows(30, 0.05, seed=1))).n == 80
    assert monitor.run(out, tmp_path / "monday.jsonl").n_new == 0


def test_the_alarm_ends_the_command_with_1_until_it_is_certified_anew(out, tmp_path):
    path, runner = log(tmp_path / "audit.jsonl", rows(200, 0.05)), CliRunner()
    call = ["monitor", str(out), str(path)]
    quiet = runner.invoke(cli.app, call)
    assert quiet.exit_code == 0, quiet.output
    assert "no alarm" in quiet.output
    log(path, rows(200, 0.05) + rows(200, 0.5, seed=1))
    assert [runner.invoke(cli.app, call).exit_code for _ in range(2)] == [1, 1]
    assert "ALARM" in runner.invoke(cli.app, call).output
    certify.run(out, risk=0.2)
    again = runner.invoke(cli.app, call)
    assert again.exit_code == 0
    assert "start anew" in again.output
    assert "audited questions: 0" in again.output  # the old certificate's answers do not count for the new one


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"abstained": false', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("[]", "an object, not list"),
        ('{"correct": true}', "`abstained` is None"),
        ('{"abstained": 0, "correct": true}', "`abstained` is 0"),
        ('{"abstained": false, "correct": null}', "`correct` is None"),
        ('{"abstained": false, "correct": "yes"}', "`correct` is 'yes'"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_counted(line, words, out, tmp_path):
    path = log(tmp_path / "audit.jsonl", rows(3, 0.1))
    monitor.run(out, path)
    before = (out / monitor.STATE).read_text()
    path.write_text(path.read_text() + json.dumps(rows(1, 0.1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=words) as caught:
        monitor.run(out, path)
    assert str(caught.value).startswith(f"{path}:5: ")
    assert (out / monitor.STATE).read_text() == before


def test_a_changed_log_a_broken_state_and_a_missing_certificate_are_told(out, tmp_path):
    path = log(tmp_path / "audit.jsonl", rows(20, 0.1))
    monitor.run(out, path)
    for changed in (rows(19, 0.1), rows(20, 0.1, seed=3)):
        with pytest.raises(UserError, match="first 20 lines are not those"):
            monitor.run(out, log(path, changed))
    (out / monitor.STATE).write_text("{}")
    with pytest.raises(UserError, match="delete it to count"):
        monitor.run(out, path)
    (out / monitor.STATE).unlink()
    forget_certificate(out)
    with pytest.raises(UserError, match="no certificate"):
        monitor.run(out, path)
    with pytest.raises(UserError, match="no such file"):
        monitor._lines(tmp_path / "none.jsonl")


def forget_certificate(out):
    content = json.loads((out / "calibration.json").read_text())
    content |= {"certificate": None, "certification": "too few", "exceptions": []}
    (out / "calibration.json").write_text(json.dumps(content))


def test_without_a_certificate_the_wanted_risk_is_watched_where_that_is_asked_for(out, tmp_path):
    forget_certificate(out)
    path = log(tmp_path / "audit.jsonl", rows(400, 0.5))
    call = ["monitor", str(out), str(path), "--uncertified"]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 1
    assert "the wanted risk no longer holds" in " ".join(done.output.split())
    assert "certified" not in done.output


def test_no_audited_answer_is_no_good_news(out, tmp_path):
    for empty in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(empty)
        with pytest.raises(UserError, match="no audited answers"):
            monitor.run(out, tmp_path / "empty.jsonl")
    done = CliRunner().invoke(cli.app, ["monitor", str(out), str(log(tmp_path / "refused.jsonl", rows(9, 0, 1.0)))])
    assert done.exit_code == 0
    assert "nothing is known of the certificate" in done.output
    assert "no alarm" not in done.output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("largest_log_evidence", math.nan),
        ("n", -3),
        ("n_wrong", 900),
        ("log_capital", [math.nan] * 9),
        ("target_risk", 0.9),
    ],
)
def test_a_state_that_could_never_alarm_is_refused(key, value, out, tmp_path):
    path = log(tmp_path / "audit.jsonl", rows(20, 0.1))
    monitor.run(out, path)
    state = json.loads((out / monitor.STATE).read_text())
    state["alarm"][key] = value
    (out / monitor.STATE).write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"impossible|another risk|delete it"):
        monitor.run(out, path)


def test_alarm_bad_input_and_failure_have_codes_of_their_own(out, tmp_path, monkeypatch, capsys):
    def code(path):
        monkeypatch.setattr("sys.argv", ["calibtrain", "monitor", str(out), str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert code(log(tmp_path / "good.jsonl", rows(50, 0.05))) == 0
    assert code(log(tmp_path / "bad.jsonl", rows(400, 0.6))) == 1
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\r\n\xff\x00")
    assert code(tmp_path / "binary.jsonl") == 2
    assert code(tmp_path / "none.jsonl") == 2
    assert code(out) == 2
    monkeypatch.setattr(monitor, "_print", lambda *args: 1 / 0)
    assert code(log(tmp_path / "more.jsonl", rows(5, 0.05))) == 3
    told = capsys.readouterr().err
    assert "not UTF-8" in told
    assert "nothing is known of the certificate: ZeroDivisionError" in told
    assert "Traceback" not in told


def test_a_line_may_hold_any_character(out, tmp_path):
    line = json.dumps({"abstained": False, "correct": True, "question": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "audit.jsonl").write_text(line + "\n" + line, encoding="utf-8")
    assert monitor.run(out, tmp_path / "audit.jsonl").n == 2


def test_words_that_are_not_kept_fail_the_command(out, tmp_path):
    rng = random.Random(0)
    told = [rng.random() for _ in range(600)]
    honest = [{"abstained": q < 0.93, "correct": rng.random() < q, "confidence": q} for q in told]
    service = monitor.run(out, log(tmp_path / "honest.jsonl", honest))
    assert sum(word.n for word in service.words) == 600
    assert not service.failed
    boast = [row | {"confidence": 0.97, "word": "almost certain", "abstained": False} for row in honest[:200]]
    path = log(tmp_path / "boast.jsonl", [row | {"correct": i % 10 > 0} for i, row in enumerate(boast)])
    told = CliRunner().invoke(cli.app, ["monitor", str(out), str(path)])
    assert told.exit_code == 1
    assert '"almost certain" promises 95% to 100%: 180 of 200 right' in told.output
    assert "NOT KEPT" in told.output


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"confidence": 1.2}, "not a probability"),
        ({"confidence": 0.5, "word": "surely"}, "`word`"),
        ({"confidence": 0.5, "word": ["likely"]}, "`word`"),
    ],
)
def test_a_confidence_or_word_that_cannot_be_is_named(out, tmp_path, changed, words):
    path = log(tmp_path / "audit.jsonl", [{"abstained": False, "correct": True} | changed])
    with pytest.raises(UserError, match=f"audit.jsonl:1: .*{words}"):
        monitor.run(out, path)


def test_questions_outside_are_counted_and_too_many_are_an_alarm(out, tmp_path):
    rng = random.Random(3)
    like = [row | {"outside": rng.random()} for row in rows(400, 0.05)]
    quiet = monitor.run(out, log(tmp_path / "audit.jsonl", like))
    assert quiet.outside.n == 400
    assert quiet.outside.n_wrong == sum(row["outside"] < 0.05 for row in like)
    assert not quiet.failed
    strange = [row | {"outside": rng.random() ** 4} for row in rows(400, 0.05, seed=1)]
    loud = monitor.run(out, log(tmp_path / "audit.jsonl", like + strange))
    assert loud.outside.n == 800
    assert loud.outside.fired
    assert loud.failed
    assert not loud.alarm.fired
    assert monitor.run(out, tmp_path / "audit.jsonl").outside.as_dict() == loud.outside.as_dict()


@pytest.mark.parametrize("bad", ["0.5", True, 1.5, float("nan")])
def test_a_p_value_that_is_none_is_named_with_its_line(out, tmp_path, bad):
    with pytest.raises(UserError, match=r"audit.jsonl:1: `outside` is .*; give the reply's p-value"):
        monitor.run(out, log(tmp_path / "audit.jsonl", [rows(1, 0.0)[0] | {"outside": bad}]))


def test_a_state_of_an_earlier_version_goes_on(out, tmp_path):
    path = log(tmp_path / "audit.jsonl", rows(50, 0.05))
    monitor.run(out, path)
    state = json.loads((out / "monitor.json").read_text())
    del state["outside"]
    (out / "monitor.json").write_text(json.dumps(state))
    log(path, rows(50, 0.05) + [row | {"outside": 0.5} for row in rows(10, 0.05)])
    found = monitor.run(out, path)
    assert (found.n, found.outside.n) == (60, 10)

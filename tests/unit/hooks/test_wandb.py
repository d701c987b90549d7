"""The real W&B SDK, offline: its own file is read back."""

import time

import pytest
import wandb

from calibtrain.confidence.answer import Answer
from calibtrain.config import TrackingConfig
from calibtrain.hooks import wandb as hook_module
from calibtrain.hooks.records import EndRecord, EvaluationRecord, LogRecord, RunRecord, SpectraRecord
from calibtrain.hooks.wandb import WandbHook, resolve_mode
from tests.wandb_file import history, records

SECRET = "a-persons-own-words"


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def job(tmp_path, first_step=0, state=None, **tracking):
    hook = WandbHook(TrackingConfig(project="test", **tracking), "a run")
    if state:
        hook.load_state_dict(state)
    hook.on_start(RunRecord({"seed": 7}, tmp_path, 9, first_step, rank=0, world_size=2))
    for step in (first_step + 1, first_step + 2):
        hook.on_log(LogRecord(step, 9, {"train/loss/nll": 1.0 / step}))
    hook.on_spectra(SpectraRecord(first_step + 2, {"layers.0.q_proj": {"alpha": 1.5}}))
    answers = [Answer(str(i), f"{SECRET}?", f"<b>{SECRET}</b>", (-0.1 * i,), i % 3 > 0) for i in range(30)]
    hook.on_evaluation(EvaluationRecord(first_step + 2, "test", {"calib/test/answer/acc": 0.5}, answers))
    artifact = tmp_path / "calibration.json"
    artifact.write_text("{}")
    hook.on_end(EndRecord(first_step + 2, None, {"accuracy": 0.5}, [artifact]))
    return hook.state_dict()


def test_offline_run_holds_keys_in_step_order_and_a_resume_keeps_its_id(tmp_path, capsys):
    state = job(tmp_path)
    wandb.teardown()  # finish() answers before its service has written the file's last bytes
    (first,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows = history(first)
    assert [row["train/step"] for row in rows] == [1, 2, 2, 2]
    assert rows[0]["train/loss/nll"] == 1.0
    assert rows[2]["spectra/layers.0.q_proj/alpha"] == rows[2]["spectra/mean/alpha"] == 1.5
    charts = {key.split("/")[3] for key in rows[3] if key.startswith("calib/test/answer/")}
    assert {"acc", "reliability", "confidence_right", "confidence_wrong"} <= charts
    assert "answers" not in charts
    assert any("risk_coverage" in chart for chart in charts)
    (run,) = (r.run for r in records(first) if r.WhichOneof("record_type") == "run")
    assert run.run_id == state["run_id"]
    assert run.project == "test"
    assert "wandb sync" in capsys.readouterr().out
    time.sleep(1.1)  # W&B names a run's folder by the second: a resume in the same one would write into the first's
    assert job(tmp_path, 2, state) == state
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {path.stem for path in files} == {f"run-{state['run_id']}"}
    assert capsys.readouterr().out.count("offline-run-") == 2


@pytest.mark.parametrize("texts", [False, True])
def test_questions_and_answers_leave_only_where_the_config_says_so(tmp_path, capsys, texts):
    job(tmp_path, log_answers=texts)
    wandb.teardown()
    kept = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert bool(kept) is texts
    assert ("gets questions, answers and grades" in capsys.readouterr().out) is texts
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    environment = [one.environment for one in records(path) if one.WhichOneof("record_type") == "environment"]
    assert not any(one.HasField("git") for one in environment)
    assert not list((tmp_path / "wandb").rglob("diff*.patch"))


def test_unreachable_server_falls_back_to_the_same_run_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(hook_module, "INIT_SECONDS", 2.0)
    wandb.teardown()  # settings of the environment are read once
    state = job(tmp_path)
    wandb.teardown()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert path.stem == f"run-{state['run_id']}"
    assert [row["train/step"] for row in history(path)] == [1, 2, 2, 2]
    assert caplog.text.count("not reachable") == 1
    assert "a" * 40 not in caplog.text


def test_a_full_queue_drops_points_and_never_blocks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hook_module, "QUEUE_SIZE", 2)
    hook = WandbHook(TrackingConfig(), "a run")
    hook._thread = object()  # a thread that takes nothing
    for step in range(5):
        hook.on_log(LogRecord(step, 9, {}))
    assert hook._dropped == 3
    assert caplog.text.count("slower than the training") == 1


def test_other_ranks_start_nothing(tmp_path):
    hook = WandbHook(TrackingConfig(), "a run")
    hook.on_start(RunRecord({}, tmp_path, 1, 0, rank=1, world_size=2))
    hook.on_log(LogRecord(1, 1, {}))
    hook.on_end(EndRecord(1, None, {}))
    assert list(tmp_path.iterdir()) == []


def test_mode(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"


def test_a_report_of_a_run_without_wandb_joins_no_earlier_one(tmp_path, monkeypatch):
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)  # of a run that was here before
    started = []
    monkeypatch.setattr(WandbHook, "on_start", lambda hook, record: started.append(record))
    facts = {"name": "run", "world_size": 1}
    for tracking, joined in (
        (TrackingConfig(mode="disabled"), 0),
        (TrackingConfig(wandb=False), 0),
        (TrackingConfig(), 1),
    ):
        hook_module.attach(tmp_path, facts, tracking, [], {})
        assert len(started) == joined

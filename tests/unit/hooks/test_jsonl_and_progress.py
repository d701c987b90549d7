"""metrics.jsonl over a resume; console lines."""

import io
import json
import math
from pathlib import Path

from rich.console import Console

from calibtrain.hooks.jsonl import JsonlHook, read_metrics
from calibtrain.hooks.progress import ProgressHook
from calibtrain.hooks.records import EvaluationRecord, LogRecord, RunRecord, SpectraRecord


def run_record(path, first_step=0, rank=0):
    return RunRecord(config={}, output_dir=Path(path), total_steps=9, first_step=first_step, rank=rank, world_size=1)


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path):
    hook = JsonlHook()
    hook.on_start(run_record(tmp_path))
    hook.on_log(LogRecord(2, 9, {"x": math.nan}))
    hook.on_log(LogRecord(4, 9, {"x": 4.0}))
    checkpoint = hook.state_dict()
    hook.on_evaluation(EvaluationRecord(4, "calibration", {"y": 1.0}, []))  # of the last step's end: done again
    hook.on_log(LogRecord(6, 9, {"x": 6.0}))
    hook.on_evaluation(EvaluationRecord(6, "test", {"y": math.inf}, []))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"event": "log", "st')  # killed while writing
    resumed = JsonlHook()
    resumed.load_state_dict(checkpoint)
    resumed.on_start(run_record(tmp_path, first_step=4))
    assert [entry["step"] for entry in read_metrics(path)] == [2, 4]
    resumed.on_log(LogRecord(6, 9, {"x": 7.0}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["x"] is None
    assert lines[2]["x"] == 7.0
    JsonlHook().on_start(run_record(tmp_path))
    assert path.read_text() == ""


def test_a_line_holds_whatever_characters_there_are(tmp_path):
    hook = JsonlHook()
    hook.on_start(run_record(tmp_path))
    for step in (1, 2):
        hook.on_log(LogRecord(step, 9, {"said": "a\u2028b\x85c\x0c\ud83d"}))
    state = hook.state_dict()
    resumed = JsonlHook()
    resumed.load_state_dict(state)
    resumed.on_start(run_record(tmp_path, first_step=2))
    assert [entry["said"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == ["a\u2028b\x85c\x0c\ud83d"] * 2


def test_readings_of_matrices_are_named_after_their_modules_beside_their_means(tmp_path):
    hook = JsonlHook()
    hook.on_start(run_record(tmp_path))
    hook.on_spectra(SpectraRecord(4, {"layers.0.q_proj": {"alpha": 1.0}, "layers.1.q_proj": {"alpha": 1.5}}))
    hook.on_spectra(SpectraRecord(6, {"layers.0.q_proj": {"alpha": math.nan}, "layers.1.q_proj": {"alpha": 1.5}}))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    each = {"spectra/layers.0.q_proj/alpha": 1.0, "spectra/layers.1.q_proj/alpha": 1.5}
    assert first == {"event": "spectra", "step": 4, "spectra/mean/alpha": 1.25, **each}
    assert second["spectra/layers.0.q_proj/alpha"] is None
    assert second["spectra/mean/alpha"] is None


def test_other_ranks_write_nothing(tmp_path):
    hook = JsonlHook()
    hook.on_start(run_record(tmp_path, rank=1))
    hook.on_log(LogRecord(1, 9, {}))
    assert list(tmp_path.iterdir()) == []


def test_progress_prints_one_plain_line_a_log_and_no_markup(tmp_path):
    out = io.StringIO()
    hook = ProgressHook(Console(file=out, force_terminal=False, width=200))
    hook.on_start(run_record(tmp_path))
    hook.on_log(LogRecord(3, 9, {"train/loss/nll": 1.25, "train/lr": 1e-5, "calib/train/token/ece15": 0.125}))
    hook.on_evaluation(EvaluationRecord(3, "[bold]split", {"calib/test/answer/acc": 0.5}, []))
    lines = out.getvalue().splitlines()
    assert "step 3/9" in lines[1]
    assert all(part in lines[1] for part in ("nll 1.25", "token ECE 0.125", "lr 1e-05", "eta 0:"))
    assert "[bold]split questions  accuracy 0.5" in lines[2]

"""What a study over seeds keeps in --work is of one set of questions: it is not mixed with another's."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from _questions import MARK, keep_apart

SPLITS = "data.splits={train: 8, calibration: 4, temperature: 0, certification: 0, test: 6}"


def settings(folder, answer="ab", count=120):
    """Of runs on questions of a file, which are asked without examples of the demo's."""
    rows = [{"question": f"What is {i}?", "answers": [answer]} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "objective={name: sft}",
        "penalties=[]",
        f"data.source={{kind: file, path: {folder / 'rows.jsonl'}}}",
        SPLITS,
    ]


def test_measurements_of_other_questions_are_refused(tmp_path):
    work = tmp_path / "work"
    keep_apart(work, settings(tmp_path))
    (work / "plain-5e-05-0.json").write_text("{}")
    keep_apart(work, settings(tmp_path))  # the same ones go on
    rate = "training.learning_rate=1e-3"
    for changed in ({"answer": "cd"}, {"count": 90}, {}):
        with pytest.raises(SystemExit, match="measurements of other questions or settings"):
            keep_apart(work, settings(tmp_path, **changed) + ([] if changed else [rate]))
    (work / MARK).unlink()
    with pytest.raises(SystemExit, match="does not say of which questions"):
        keep_apart(work, settings(tmp_path))

"""Answers that a file holds as objects are their JSON text, for tasks that grade JSON."""

import json

import numpy as np
import pytest

from calibtrain.config import RunConfig
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.errors import UserError
from calibtrain.pipeline.prepare import prepare
from calibtrain.tasks.kinds import task_of

CITY = {"city": "Zürich", "tags": ["a", "b"]}


def read(row, objects=True):
    return record_from_row(row, find_layout(list(row), {}, "rows.jsonl", objects=objects), "rows.jsonl:3")


def test_an_object_is_an_answer():
    record = read({"question": "Which?", "answers": CITY})
    assert record.accepted == (record.chosen,)
    assert json.loads(record.chosen) == CITY
    assert "Zürich" in record.chosen


def test_an_object_with_the_arrays_of_a_parquet_file():
    record = read({"question": "Which?", "answers": {"city": "Zürich", "tags": np.array(["a", "b"], dtype=object)}})
    assert json.loads(record.accepted[0]) == CITY


def test_an_object_is_a_completion_and_a_message_stays_one():
    assert json.loads(read({"prompt": "Which?", "completion": CITY}).chosen) == CITY
    record = read({"prompt": "Which?", "chosen": CITY, "rejected": {"city": "Bern"}})
    assert json.loads(record.rejected) == {"city": "Bern"}
    turns = [{"role": "assistant", "content": "Bern"}]
    assert read({"prompt": "Which?", "completion": turns}).chosen == "Bern"


TRIVIA = {"value": "David Seville", "aliases": ["Ross Bagdasarian", "David Seville "], "type": "WikipediaEntity"}


def test_an_answer_with_its_other_names_is_these_texts():
    record = read({"question": "Who?", "answers": TRIVIA}, objects=False)
    assert record.accepted == ("David Seville", "Ross Bagdasarian")
    assert record.chosen == "David Seville"
    arrays = {**TRIVIA, "aliases": np.array(TRIVIA["aliases"], dtype=object)}
    assert read({"question": "Who?", "answers": arrays}, objects=False).accepted == record.accepted
    assert json.loads(read({"question": "Who?", "answers": TRIVIA}).chosen) == TRIVIA


@pytest.mark.parametrize("answers", [CITY, {"value": "x"}, {"value": 3, "aliases": ["x"]}, [{"text": "Bern"}]])
def test_an_object_is_refused_where_the_task_takes_none(answers):
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: answers holds .* task.kind is json or custom: write its texts into"
    ):
        read({"question": "Which?", "answers": answers}, objects=False)


def test_options_are_no_objects():
    with pytest.raises(UserError, match=r"rows.jsonl:3: options holds"):
        read({"question": "Which?", "answers": "x", "options": {"city": "x"}})


@pytest.mark.parametrize(
    ("section", "objects"),
    [
        ({"kind": "json", "schema": {"type": "object"}}, True),
        ({"kind": "custom", "grader": "builtins:bool"}, True),
        ({"kind": "short_answer"}, False),
        ({"kind": "number"}, False),
    ],
)
def test_the_task_says_whether_objects_are_answers(section, objects):
    assert task_of(RunConfig(task=section).task).objects is objects


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_reads_objects_as_its_task_does(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}?", "answers": {"n": i}}) + "\n" for i in range(200)))
    source = {"kind": "file", "path": str(rows), "streaming": streaming}
    sizes = {"calibration": 8, "temperature": 8, "certification": 8, "test": 8}
    task = {"kind": "json", "schema": {"type": "object"}}
    config = RunConfig(data={"source": source, "splits": sizes}, task=task, objective={"name": "sft"})
    assert all(record.accepted[0].startswith('{"n": ') for record in prepare(config).splits["test"])
    short = RunConfig(data={"source": source, "splits": sizes}, objective={"name": "sft"})
    with pytest.raises(UserError, match=r"rows.jsonl:1: answers holds .* task.kind is json or custom"):
        prepare(short)


@pytest.mark.parametrize(
    "answers", [{"size": float("nan")}, {"text": ["Bern"], "answer_start": [3]}, [{"text": "Bern"}]]
)
def test_what_is_no_answer_is_refused(answers):
    with pytest.raises(UserError, match=r"rows.jsonl:3: answers holds"):
        read({"question": "Which?", "answers": answers})

"""Answers that a file holds as objects are their JSON text, for tasks that grade JSON."""

import json

import numpy as np
import pytest

from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.errors import UserError

CITY = {"city": "Zürich", "tags": ["a", "b"]}


def read(row):
    return record_from_row(row, find_layout(list(row), {}, "rows.jsonl"), "rows.jsonl:3")


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


@pytest.mark.parametrize(
    "answers", [{"size": float("nan")}, {"text": ["Bern"], "answer_start": [3]}, [{"text": "Bern"}]]
)
def test_what_is_no_answer_is_refused(answers):
    with pytest.raises(UserError, match=r"rows.jsonl:3: answers holds"):
        read({"question": "Which?", "answers": answers})

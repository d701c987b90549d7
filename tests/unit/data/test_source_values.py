"""What a cell of a row is: text as it stands, numbers as people write them, lists only where they are JSON."""

import json
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibtrain.config import FileSource, HubSource
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError
from tests.unit.data.test_sources import source, write


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("text", ["[0, 3, 5]", "[0, 1)", "(-1, 1)", '["a", "b"]', "[", "{}", "null"])
def test_text_is_text_whatever_it_looks_like(tmp_path, suffix, text):
    rows = [{"question": text, "answers": text}, {"question": "q", "answers": "a"}]
    found = {record.question: record for record in load_records(source(write(tmp_path / f"rows{suffix}", rows)))}
    assert (found[text].chosen, found[text].accepted) == (text, (text,))


@pytest.mark.parametrize(
    ("cell", "accepted"),
    [
        ("[0, 3, 5]", ("0", "3", "5")),
        ('["a", "b"]', ("a", "b")),
        ("[0, 1)", ("[0, 1)",)),
        ("(-1, 1)", ("(-1, 1)",)),
        ("[1 2 3]", ("[1 2 3]",)),
        ("2.50", ("2.50",)),
    ],
)
def test_a_csv_cell_is_a_list_where_it_is_a_json_list(tmp_path, cell, accepted):
    path = write(tmp_path / "rows.csv", [{"question": "q", "answers": cell}])
    assert load_records(source(path))[0].accepted == accepted


@pytest.mark.parametrize("cell", ["['Paris', 'paris']", "['Paris' 'paris']", "[\"it's\", 'x']"])
def test_lists_of_answers_as_python_prints_them_are_refused(tmp_path, cell):
    path = write(tmp_path / "rows.csv", [{"question": "q", "answers": cell}])
    with pytest.raises(UserError, match=r"rows\.csv:2: answers holds a list as Python prints it.*json\.dumps"):
        load_records(source(path))


REPR = "[{'role': 'user', 'content': 'What is 0 plus 0?'}, {'role': 'assistant', 'content': 'It is 0.'}]"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": REPR, "completion": "It is 0."}, "prompt"),
        ({"prompt": "q", "completion": REPR}, "completion"),
        ({"messages": REPR}, "messages"),
        ({"prompt": "q", "chosen": REPR.replace(", {", "\n {"), "rejected": "x"}, "chosen"),  # numpy's
        ({"messages": f"array({REPR}, dtype=object)"}, "messages"),
    ],
)
def test_messages_as_python_prints_them_are_refused(tmp_path, suffix, row, field):
    with pytest.raises(UserError, match=rf"rows{suffix}.*: {field} holds a list as Python prints it.*json\.dumps"):
        load_records(source(write(tmp_path / f"rows{suffix}", [row])))


def test_messages_in_text_are_messages_in_csv_and_in_the_messages_column_alone(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for suffix in (".csv", ".jsonl", ".parquet"):
        [record] = load_records(source(write(tmp_path / f"m{suffix}", [{"messages": json.dumps(turns)}])))
        assert (record.question, record.chosen) == ("q", "a")
    row = {"prompt": json.dumps(turns[:1]), "completion": "a"}
    assert load_records(source(write(tmp_path / "p.csv", [row])))[0].question == "q"
    with pytest.raises(UserError, match=r"p\.jsonl:1: prompt is text that holds a list of messages"):
        load_records(source(write(tmp_path / "p.jsonl", [row])))
    row["prompt"] = '[{"role": "user"}] lacks a key; which?'
    assert load_records(source(write(tmp_path / "p.jsonl", [row])))[0].question == row["prompt"]


def test_whole_numbers_of_a_float_column_are_written_as_people_write_them(tmp_path):
    years = [None, 1925.0, 1926.0, -44.0]
    rows = [{"question": f"q{i}", "answers": year, "completion": f"In {i}."} for i, year in enumerate(years)]
    for suffix in (".parquet", ".jsonl", ".json", ".csv"):
        path = write(tmp_path / f"years{suffix}", rows)
        found = {record.question: record.accepted for record in load_records(source(path))}
        assert found == {"q0": (), "q1": ("1925",), "q2": ("1926",), "q3": ("-44",)}
    rows[0]["answers"] = 2.5
    found = {record.question: record.accepted for record in load_records(source(write(tmp_path / "m.csv", rows)))}
    assert found["q1"] == ("1925.0",)  # a column of measurements
    lists = [{"question": "q", "answers": [1925.0, 0.5]}]
    assert load_records(source(write(tmp_path / "l.parquet", lists)))[0].accepted == ("1925", "0.5")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.1, pa.float32(), "0.1"),
        (7.0, pa.float32(), "7"),
        (Decimal("1925.00"), pa.decimal128(10, 2), "1925"),
        (Decimal("12.50"), pa.decimal128(10, 2), "12.50"),
        (date(1925, 3, 1), pa.date32(), "1925-03-01"),
        (datetime(1925, 3, 1), pa.timestamp("us"), "1925-03-01"),
        (datetime(1925, 3, 1, 12, 30), pa.timestamp("us"), "1925-03-01 12:30:00"),
        (2**60, pa.int64(), str(2**60)),
        (1e300, pa.float64(), "1e+300"),
    ],
)
def test_typed_columns_as_people_write_them(tmp_path, value, kind, text):
    pq.write_table(pa.table({"question": ["q"], "answers": pa.array([value], kind)}), tmp_path / "t.parquet")
    assert load_records(source(tmp_path / "t.parquet"))[0].accepted == (text,)
    pq.write_table(pa.table({"prompt": ["q"], "completion": pa.array([value], kind)}), tmp_path / "c.parquet")
    assert load_records(source(tmp_path / "c.parquet"))[0].chosen == text


def test_numpy_values_of_a_hub_set(monkeypatch):
    import datasets

    turns = np.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], dtype=object)
    rows = [
        {"messages": turns, "answers": np.array(["a", "b"])},
        {"messages": [*turns[:1], {"role": "assistant", "content": "a"}], "answers": np.float32(0.1)},
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter(rows))
    found = load_records(HubSource(kind="hub", name="some/set"))
    assert [record.accepted for record in found] == [("a", "b"), ("0.1",)]
    assert {record.question for record in found} == {"q"}


def test_narrow_floats_within_parquet_lists_are_as_people_wrote_them(tmp_path):
    table = pa.table(
        {
            "question": ["a?", "b?"],
            "answers": pa.array([[0.1, 2.0], None], pa.list_(pa.float32())),
            "completion": ["x", "y"],
        }
    )
    pq.write_table(table, tmp_path / "f.parquet")
    records = load_records(FileSource(kind="file", path=tmp_path / "f.parquet"))
    assert {one.accepted for one in records} == {("0.1", "2"), ()}

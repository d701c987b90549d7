"""A column that the user mapped is read, whatever other columns of the file are called."""

import json

import pytest

from calibtrain.config import FileSource
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def read(row, columns=(), **options):
    return record_from_row(row, find_layout(list(row), dict(columns), "rows", **options), "rows:1")


MAPPED = {
    "a question beside a prompt": (
        {"question": "Where is Lyon?", "prompt": "Be brief.", "answers": "France"},
        {"question": "question", "answers": "answers"},
        ("Where is Lyon?", "France", None),
    ),
    "a renamed question beside a prompt": (
        {"q": "Where is Lyon?", "prompt": "Be brief.", "gold": "France"},
        {"question": "q", "answers": "gold"},
        ("Where is Lyon?", "France", None),
    ),
    "a prompt beside a question": (
        {"p": "Where is Lyon?", "question": "Other?", "completion": "France"},
        {"prompt": "p"},
        ("Where is Lyon?", "France", None),
    ),
    "a conversation beside a prompt and completion": (
        {"conv": turns("U", "A"), "prompt": "P", "completion": "C"},
        {"messages": "conv"},
        ("U", "A", None),
    ),
    "a conversation beside a pair": (
        {"conv": turns("U", "A"), "chosen": turns("P", "C"), "rejected": turns("P", "R")},
        {"messages": "conv"},
        ("U", "A", None),
    ),
    "a question in turns with its pair": (
        {"conv": turns("U"), "chosen": "C", "rejected": "R"},
        {"messages": "conv"},
        ("U", "C", "R"),
    ),
    "a pair beside a completion": (
        {"prompt": "P", "good": "G", "rejected": "R", "completion": "C"},
        {"chosen": "good"},
        ("P", "G", "R"),
    ),
    "a completion beside a pair": (
        {"question": "Q", "long": "L", "chosen": "CH", "rejected": "RJ"},
        {"question": "question", "completion": "long"},
        ("Q", "L", None),
    ),
    "a prompt of Alpaca's beside a question": (
        {"instruction": "I", "input": "", "output": "O", "question": "Q", "a": "A"},
        {"prompt": "instruction", "answers": "a"},
        ("I", "A", None),
    ),
    "a prompt beside a conversation": (
        {"prompt": "P", "a": "A", "messages": turns("U", "V")},
        {"prompt": "prompt", "answers": "a"},
        ("P", "A", None),
    ),
    "a text beside everything": (
        {
            "body": "T",
            "question": "Q",
            "completion": "C",
            "messages": turns("U", "A"),
            "instruction": "I",
            "output": "O",
        },
        {"text": "body"},
        ("", "T", None),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_column_is_read(name):
    row, columns, expected = MAPPED[name]
    record = read(row, columns)
    assert (record.question, record.chosen, record.rejected) == expected


def test_what_a_mapping_leaves_without_an_answer_is_refused():
    with pytest.raises(UserError, match="rows: the columns found are prompt, messages; accepted are"):
        read({"prompt": "P", "messages": turns("U", "A")}, {"prompt": "prompt"})


@pytest.mark.parametrize(
    ("columns", "lost"),
    [
        ({"question": "a", "prompt": "b", "answers": "c"}, "question"),
        ({"prompt": "a", "completion": "b", "chosen": "c"}, "completion"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "text"),
        ({"prompt": "a", "messages": "turns"}, "prompt"),
    ],
)
def test_two_mapped_columns_of_one_meaning_are_refused(columns, lost):
    with pytest.raises(UserError, match=rf"rows:1: columns maps '{lost}', and also a field .* map one"):
        read({"a": "1", "b": "2", "c": "3", "turns": turns("U", "A")}, columns)


def test_rows_of_either_shape_are_read_each_by_its_own():
    columns = {"question": "q", "prompt": "p", "answers": "a"}
    layout = find_layout(["q", "p", "a"], columns, "rows")
    rows = ({"q": "1?", "a": "x"}, {"p": "2?", "a": "x"})
    assert [record_from_row(row, layout, "rows:1").question for row in rows] == ["1?", "2?"]


@pytest.mark.parametrize("stored", [False, True])
def test_columns_that_another_one_is_read_for_are_named(tmp_path, caplog, stored):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "P", "question": "Q", "completion": "C", "messages": turns("U", "A"), "topic": "x"},
        {"question": "Q2", "completion": "C"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(kind="file", path=path)
    with caplog.at_level("INFO", logger="calibtrain"):
        if stored:
            from calibtrain.data.drops import DropReport
            from calibtrain.data.stored import Made, stored_records

            made = Made(0, False, "{}", lambda record: record, lambda record: False)
            records = stored_records(source, made, tmp_path / "cache", DropReport())
        else:
            records = load_records(source)
    assert sorted(record.question for record in records) == ["P", "Q2"]
    [line] = [line for line in caplog.messages if "columns not read" in line]
    assert "columns not read: topic, messages (in 1 of 2 rows: another column" in line
    assert "question (in 1 of 2 rows:" in line
    assert not any(name in line for name in ("completion", "prompt"))


def test_a_mapping_says_what_is_not_read(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Q", "prompt": "P", "answers": "A"}) + "\n")
    with caplog.at_level("INFO", logger="calibtrain"):
        load_records(FileSource(kind="file", path=path, columns={"question": "question"}))
    assert "columns not read: prompt" in caplog.text

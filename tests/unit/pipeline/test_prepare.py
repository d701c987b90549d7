"""Rows that cannot serve: counted, named and kept, and an error where they are too many or `strict` asks for it."""

import json

import pytest

from calibtrain.config import RunConfig
from calibtrain.data.drops import DropReport, check_share, write_dropped
from calibtrain.errors import UserError
from calibtrain.pipeline import prepare as preparing
from calibtrain.pipeline.prepare import prepare
from calibtrain.tasks.short_answer import ShortAnswer

GOOD = [json.dumps({"question": f"What is {i}?", "answers": [f"{i}"]}) for i in range(60)]
SPLITS = {"train": None, "calibration": 2, "temperature": 2, "certification": 2, "test": 2}


def config(path, lines, **data):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    source = {"kind": "file", "path": str(path)}
    return RunConfig.model_validate(
        {"data": {"source": source, "splits": SPLITS, **data}, "objective": {"name": "sft"}}
    )


BAD = {
    "not JSON": ("{", r":31: not JSON"),
    "not UTF-8": (b'{"question": "\xff"}\n', r":31: not UTF-8 \(byte 0xff\)"),
    "no object": ("[1]", ":31: each row is an object"),
    "no answer": ('{"question": "Why?"}', ":31: the row has no answer"),
    "half a character": ('{"question": "\\ud83d", "answers": ["x"]}', ":31: the prompt holds"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_odd_row_ends_no_run_unless_strict(tmp_path, kind):
    line, words = BAD[kind]
    lines = [*GOOD[:30], line, *GOOD[30:]]
    prepared = prepare(config(tmp_path / "rows.jsonl", lines))
    [row] = prepared.drops.unfit
    assert row.place.endswith("rows.jsonl:31")
    assert prepared.read == 61
    assert any("rows.jsonl:31" in line for line in prepared.drops.lines())
    with pytest.raises(UserError, match=words):
        prepare(config(tmp_path / "rows.jsonl", lines, strict=True))
    with pytest.raises(UserError, match=r"1 of 61 rows cannot serve, more than data\.max_dropped \(1%\).*" + words):
        prepare(config(tmp_path / "rows.jsonl", lines, max_dropped=0.01))


def test_a_csv_row_with_too_few_cells_is_left_out(tmp_path):
    lines = ["question,answers", *(f"What is {i}?,{i}" for i in range(60)), "lonely", "too,many,cells"]
    prepared = prepare(config(tmp_path / "rows.csv", lines))
    assert [row.place[-2:] for row in prepared.drops.unfit] == ["62", "63"]


def test_the_first_three_reasons_are_shown(tmp_path):
    odd = ["{", '{"question": "Why?"}', '{"answers": ["x"]}', "[1]"]
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "rows.jsonl", [*odd * 5, *GOOD]))
    told = str(caught.value)
    assert "20 of 80 rows cannot serve" in told
    assert told.count("rows.jsonl:") == 4  # the file, and three rows
    assert "each row is an object" in told


def test_what_the_whole_file_lacks_is_told_at_once(tmp_path):
    for lines, words in (
        ([], "is empty"),
        (["["], "named .json"),
        (['{"words": "x"}'] * 60, "the columns found are words"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(config(tmp_path / "rows.jsonl", lines))


class NoSevens(ShortAnswer):
    """Cannot ask what ends with a seven."""

    def asked(self, record):
        if record.chosen.endswith("7"):
            raise UserError(f"{record.origin}: a seven")
        return record


def test_a_row_that_the_task_refuses_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "task_of", lambda section: NoSevens())
    prepared = prepare(config(tmp_path / "rows.jsonl", GOOD))
    assert len(prepared.drops.unfit) == 6
    assert {(row.reason, row.question[-2:]) for row in prepared.drops.unfit} == {("a seven", "7?")}
    with pytest.raises(UserError, match="a seven"):
        prepare(config(tmp_path / "rows.jsonl", GOOD, strict=True))


def test_the_file_of_dropped_rows(tmp_path):
    drops = DropReport()
    drops.refuse(UserError("f:1: is odd"), "f:1", "q" * 300)
    drops.refuse("leaves no room", "f:2\ud83d", "é")
    write_dropped(drops.unfit, tmp_path / "dropped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["reason"], len(row["question"])) for row in rows] == [("is odd", 200), ("leaves no room", 1)]
    write_dropped([], tmp_path / "dropped.jsonl")
    assert not (tmp_path / "dropped.jsonl").exists()
    check_share(drops.unfit, 20, 0.1, "f")
    with pytest.raises(UserError, match="2 of 19"):
        check_share(drops.unfit, 19, 0.1, "f")


def test_many_reasons_are_cut_short():
    drops = DropReport()
    for i in range(20):
        drops.refuse(f"reason {i}", f"f:{i}")
    assert len(drops.lines()) == 9
    assert drops.lines()[-1].startswith("12 dropped for 12 other reasons")

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibtrain.config import FileSource, HubSource
from calibtrain.data.records import Message
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError

QA = [
    {"question": "Capital of France?", "answers": ["Paris", "paris, France"]},
    {"question": "2 + 2?", "answers": ["4"]},
]


def source(path, **columns):
    return FileSource(kind="file", path=path, columns=columns)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return path


def one(tmp_path, row, **columns):
    [record] = load_records(source(write(tmp_path / "rows.jsonl", [row]), **columns))
    return record


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path, suffix):
    records = load_records(source(write(tmp_path / f"qa{suffix}", QA)))
    found = {record.question: (record.chosen, record.accepted) for record in records}
    assert found == {
        "Capital of France?": ("Paris", ("Paris", "paris, France")),
        "2 + 2?": ("4", ("4",)),
    }


@pytest.mark.parametrize(
    ("suffix", "place"), [(".jsonl", ":2"), (".json", r"\[1\]"), (".csv", ":3"), (".parquet", r"\[1\]")]
)
def test_a_row_without_an_answer_is_named(tmp_path, suffix, place):
    rows = [QA[0], {"question": "Why?", "answers": []}]
    path = write(tmp_path / f"qa{suffix}", rows)
    with pytest.raises(UserError, match=rf"qa{suffix}{place}: the row has no answer"):
        load_records(source(path))


def test_draw_order_depends_on_seed_and_questions_alone(tmp_path):
    rows = [{"question": f"q{i}", "answers": "a"} for i in range(50)]
    forward = load_records(source(write(tmp_path / "a.jsonl", rows)), seed=3)
    backward = load_records(source(write(tmp_path / "b.jsonl", rows[::-1])), seed=3)
    other = load_records(source(tmp_path / "a.jsonl"), seed=4)
    assert [r.question for r in forward] == [r.question for r in backward]
    assert [r.question for r in forward] != [r["question"] for r in rows]
    assert [r.question for r in forward] != [r.question for r in other]


def test_prompt_completion(tmp_path):
    record = one(tmp_path, {"prompt": "Say hi", "completion": "hi", "source": "x"})
    assert (record.prompt, record.chosen, record.rejected, record.accepted) == (
        (Message("user", "Say hi"),),
        "hi",
        None,
        (),
    )
    assert record.origin.endswith("rows.jsonl:1")


def test_ultrafeedback_rows(tmp_path):
    ask = {"role": "user", "content": "How are you?"}
    row = {
        "prompt": "How are you?",
        "prompt_id": "ab12",
        "chosen": [ask, {"role": "assistant", "content": "Well, thanks."}],
        "rejected": [ask, {"role": "assistant", "content": "No."}],
        "messages": [ask, {"role": "assistant", "content": "Well, thanks."}],
        "score_chosen": 8.0,
    }
    record = one(tmp_path, row)
    assert record.prompt == (Message("user", "How are you?"),)
    assert (record.chosen, record.rejected) == ("Well, thanks.", "No.")
    row["rejected"][0] = {"role": "user", "content": "Something else"}
    with pytest.raises(UserError, match="different prompts"):
        one(tmp_path, row)


def test_preference_pair_of_strings_and_of_lone_assistant_turns(tmp_path):
    record = one(tmp_path, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (record.question, record.chosen, record.rejected) == ("q", "good", "bad")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    record = one(
        tmp_path,
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
    )
    assert record.prompt == (Message("system", "Be brief."), Message("user", "q"))
    assert (record.chosen, record.rejected) == ("good", "bad")


def test_messages_end_at_the_last_assistant_turn(tmp_path):
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
    ]
    record = one(tmp_path, {"messages": turns})
    assert [m.content for m in record.prompt] == ["1", "2", "3"]
    assert record.chosen == "4"


def test_columns_are_mapped(tmp_path):
    record = one(tmp_path, {"q": "Capital of Peru?", "gold": "Lima", "question": 7}, question="q", answers="gold")
    assert (record.question, record.accepted) == ("Capital of Peru?", ("Lima",))


def test_numbers_and_text_that_looks_like_a_list_of_answers(tmp_path):
    assert one(tmp_path, {"question": "2+2?", "answers": 4}).accepted == ("4",)
    assert one(tmp_path, {"question": "q", "answers": '["a", "b"]'}).accepted == ("a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "rejected": "bad", "completion": "x"}, "needs both"),
        ({"prompt": "q", "completion": "  "}, "answer is empty"),
        ({"prompt": " ", "completion": "x"}, "question is empty"),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, "rejected answer is empty"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no question"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "each message of messages"),
        ({"messages": [{"role": "user"}]}, "each message of messages"),
        ({"messages": 3}, "text or a list of messages"),
        ({"question": "q", "answers": '["a", '}, "like a JSON list"),
        ({"question": "q", "answers": [{"text": "a"}]}, "must be text or a number"),
        ({"question": "q", "answers": ["a", " "]}, "empty answer"),
        ({"chosen": "good", "rejected": "bad"}, "no question or prompt"),
        (
            {"prompt": [{"role": "assistant", "content": "hm"}], "completion": "x"},
            "must follow a user turn",
        ),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "y"}, "must be the assistant's"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{message}"):
        one(tmp_path, row)


def test_unknown_columns_list_what_was_found_and_what_is_accepted(tmp_path):
    with pytest.raises(UserError, match=r"found are input, output; accepted are question \+ answers"):
        one(tmp_path, {"input": "q", "output": "a"})
    with pytest.raises(UserError, match=r"columns\.question names 'q'; the columns found are input, output"):
        one(tmp_path, {"input": "q", "output": "a"}, question="q")
    with pytest.raises(UserError, match="'asnwers', which is no field"):
        one(tmp_path, {"input": "q", "output": "a"}, asnwers="output")


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv"])
@pytest.mark.parametrize("text", ["", "\n"])
def test_empty_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text if name != "e.json" else "[]")
    with pytest.raises(UserError, match=f"{name}: the data set is empty"):
        load_records(source(path))


def test_header_only_csv_and_empty_parquet(tmp_path):
    (tmp_path / "e.csv").write_text("question,answers\n")
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "e.parquet")
    for name in ("e.csv", "e.parquet"):
        with pytest.raises(UserError, match="the data set is empty"):
            load_records(source(tmp_path / name))


def test_files_that_cannot_be_read(tmp_path):
    cases = {
        "bad.jsonl": (b'{"question": "q", "answers": "a"}\n{"question": \n', r"bad\.jsonl:2: not JSON"),
        "list.jsonl": (b"[1, 2]\n", r"list\.jsonl:1: each row is an object"),
        "bad.json": (b'[\n{"a": 1},\n{"a" 2}]', r"bad\.json:3: not JSON"),
        "one.json": (b'{"question": "q"}', "one list of objects"),
        "bad.parquet": (b"PAR", "not a Parquet file"),
        "latin.jsonl": ('{"question": "é"}'.encode("latin-1"), "not UTF-8"),
        "rows.xlsx": (b"", "unknown file type '.xlsx'"),
        "wide.csv": (b"question,answers\nWhat, now?,a\n", r"wide\.csv:2: more cells"),
        "open.csv": (b'question,answers\nq,a\n"q,a\n', r"open\.csv:3: not CSV"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_records(source(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        load_records(source(tmp_path / "absent.jsonl"))


def test_csv_rows_are_named_by_their_first_line(tmp_path):
    (tmp_path / "m.csv").write_text('question,answers\n"two\nlines",a\nq,\n')
    with pytest.raises(UserError, match=r"m\.csv:4: the row has no answer"):
        load_records(source(tmp_path / "m.csv"))


def test_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "q", "answers": "a"}\n\n')
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfquestion,answers\r\nq,a\r\n")
    for name in ("b.jsonl", "b.csv"):
        assert len(load_records(source(tmp_path / name))) == 1


def test_hub_rows_and_limit(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, **options):
        calls.append((name, subset, options))
        return iter({"question": f"q{i}", "answers": ["a"]} for i in range(100))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records(HubSource(kind="hub", name="some/set", subset="main", streaming=True, limit=7))
    assert sorted(record.question for record in records) == [f"q{i}" for i in range(7)]
    assert calls == [("some/set", "main", {"split": "train", "revision": None, "streaming": True})]
    assert {record.origin for record in records} >= {"some/set[train][0]"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'some/set' on the Hub (offline mode)"), "hub cannot be reached"),
        (ValueError('Unknown split "dev". Should be one of'), "no such subset or split"),
        (RuntimeError("boom\nsecond line"), r"cannot be loaded \(RuntimeError: boom\)"),
    ],
)
def test_hub_failures_are_user_errors(monkeypatch, error, message):
    import datasets

    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=message):
        load_records(HubSource(kind="hub", name="some/set"))


def test_hub_set_not_found(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*args, **options):
        raise DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="no such data set"):
        load_records(HubSource(kind="hub", name="some/set"))


def test_a_stream_that_breaks_midway_is_a_user_error(monkeypatch):
    import datasets

    def rows():
        yield {"question": "q", "answers": "a"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    with pytest.raises(UserError, match="connection reset"):
        load_records(HubSource(kind="hub", name="some/set"))

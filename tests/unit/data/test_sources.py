"""Rows of every format become the same records, or are refused by name."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibtrain.config import FileSource
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError
from calibtrain.records import Message

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
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


def test_a_question_alone_serves_where_the_model_answers_it_itself(tmp_path):
    rows = [{"prompt": "Why?"}, {"prompt": TURNS[:1]}]
    path = write(tmp_path / "bare.jsonl", rows)
    assert {(one.question, one.chosen) for one in load_records(source(path), bare=True)} == {
        ("Why?", None),
        ("q", None),
    }
    with pytest.raises(UserError, match="the columns found are prompt"):
        load_records(source(path))
    mixed = write(tmp_path / "mixed.jsonl", [{"prompt": "Why?", "answers": ["So"]}, {"prompt": "How?"}])
    assert {one.accepted for one in load_records(source(mixed), bare=True)} == {("So",), ()}
    with pytest.raises(UserError, match="the row has no answer"):
        load_records(source(mixed))


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
        ({"messages": 3}, "messages must be a list of messages"),
        ({"messages": "hello"}, "messages must be a list of messages"),
        ({"prompt": {"a": 1}, "completion": "x"}, "text or a list of messages"),
        ({"prompt": "q", "completion": True}, "text or a list of messages"),
        ({"question": "q", "answers": True}, 'say true and false in words, e.g. "yes"'),
        ({"question": "q", "answers": ["a", None]}, "answers holds None"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "tool_calls",
        ),
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


SURROGATE = "Say hello to the crowd \ud83d"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": SURROGATE, "completion": "x"}, "prompt"),
        ({"prompt": "q", "completion": SURROGATE}, "answer"),
        ({"prompt": "q", "chosen": "x", "rejected": SURROGATE}, "rejected answer"),
        ({"question": "q", "answers": ["x", SURROGATE]}, "accepted answer"),
        ({"messages": [{"role": "system", "content": SURROGATE}, *TURNS]}, "prompt"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": SURROGATE}]}, "answer"),
    ],
)
def test_half_of_a_character_is_named_with_its_place(tmp_path, row, name):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "x"}, row])
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: the {name} holds \\ud83d, half of a character") as told:
        load_records(source(path))
    str(told.value).encode()


def test_half_of_a_character_in_the_name_of_a_column_can_be_told(tmp_path):
    with pytest.raises(UserError, match=r"columns found are pro\\ud83d, completion") as told:
        one(tmp_path, {"pro\ud83d": "q", "completion": "x"})
    str(told.value).encode()


def test_a_character_beyond_the_basic_plane_is_whole(tmp_path):
    (tmp_path / "e.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "completion": "x"}')
    assert load_records(source(tmp_path / "e.jsonl"))[0].question == "\N{GRINNING FACE}"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_lines_end_at_line_feeds_alone(tmp_path, mark):
    rows = [{"prompt": f"q{i}{mark}?", "completion": f"a{mark}b"} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=ord(mark) < 32) + "\r\n" for row in rows), encoding="utf-8")
    found = load_records(source(path))
    assert {(one.question, one.chosen) for one in found} == {(f"q{i}{mark}?", f"a{mark}b") for i in range(3)}
    found = load_records(source(write(tmp_path / "rows.csv", rows)))
    assert {(one.question, one.chosen) for one in found} == {(f"q{i}{mark}?", f"a{mark}b") for i in range(3)}


def test_columns_are_those_of_the_whole_file(tmp_path):
    rows = [{"prompt": "What is 0 plus 0?", "completion": "It is 0."}]
    rows += [
        {"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}.", "gold": [str(2 * i)]} for i in (1, 2)
    ]
    for ordered in (rows, rows[::-1]):
        found = load_records(source(write(tmp_path / "rows.jsonl", ordered), answers="gold"))
        assert sorted(record.accepted for record in found) == [(), ("2",), ("4",)]
    rows = [{"question": row["prompt"], "gold": row.get("gold")} for row in rows]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the row has no answer"):
        load_records(source(write(tmp_path / "rows.jsonl", rows), answers="gold"))


def test_alpaca(tmp_path):
    def read(row, **columns):
        record = one(tmp_path, row, **columns)
        return [(turn.role, turn.content) for turn in record.prompt], record.chosen

    row = {"instruction": "Translate to French.", "input": "number 3", "output": "nombre 3"}
    expected = [("user", "Translate to French.\nnumber 3")], "nombre 3"
    assert read(row) == expected
    assert read(row, prompt="instruction") == expected
    assert read(row, question="instruction", completion="output") == expected
    assert read({**row, "input": ""}) == ([("user", "Translate to French.")], "nombre 3")
    assert read({**row, "system": "Be brief.", "history": [["q", "a"]]}) == (
        [("system", "Be brief."), ("user", "q"), ("assistant", "a"), *expected[0]],
        "nombre 3",
    )
    pair = {"instruction": "Write.", "input": "x", "chosen": "good", "rejected": "bad"}
    assert read(pair) == ([("user", "Write.\nx")], "good")
    # Another layout's column of that name is its own.
    assert read({"prompt": "q", "completion": "a", "input": "x", "instruction": "y"}) == ([("user", "q")], "a")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: history is a list of \[question, answer\] pairs"):
        read({**row, "history": "q"})


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    with caplog.at_level("INFO", logger="calibtrain"):
        one(
            tmp_path, {"instruction": "q", "context": "c", "response": "a"}, prompt="instruction", completion="response"
        )
    assert "columns not read: context" in caplog.text


def test_json_as_people_name_it(tmp_path):
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in QA))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": QA}))
    for name in ("lines.json", "data.json"):
        assert len(load_records(source(tmp_path / name))) == 2


def test_large_cells_blank_rows_and_quoted_breaks_of_csv(tmp_path):
    text = "x" * 300_000
    (tmp_path / "c.csv").write_text(f'question,answers\r\n\r\n"{text}","a\r\nb"\r\n\r\n', newline="")
    [record] = load_records(source(tmp_path / "c.csv"))
    assert (record.question, record.chosen, record.origin) == (text, "a\r\nb", f"{tmp_path / 'c.csv'}:3")
    assert csv.field_size_limit() == 131_072


def test_files_that_cannot_be_read(tmp_path):
    cases = {
        "tabs.csv": (b"question\tanswers\nq\ta\n", r"separated by '\\t'"),
        "excel.csv": (b"question;answers\nq;a\n", "separated by ';'"),
        "short.csv": (b"question,answers\nq,a\nq\n", r"short\.csv:3: 1 cells, fewer"),
        "twice.csv": (b"question,answers,answers\nq,a,b\n", "two columns are named 'answers'"),
        "utf16.csv": ("question,answers\nq,a\n".encode("utf-16"), "UTF-16"),
        "list.json": (b'[{"question": "q", "answers": "a"}, 3]', r"list\.json\[1\]: each row is an object"),
        "columns.json": (
            b'{"question": {"0": "q"}, "answers": {"0": "a"}}',
            "keys question, answers.*orient='records'",
        ),
        "whole.jsonl": (b'[{"question": "q", "answers": "a"}]', "one JSON list is named .json"),
        "pretty.jsonl": (b'{\n"question": "q"}', r"pretty\.jsonl:1: not JSON.*one whole object"),
        "late.jsonl": (b'{"question": "q", "answers": "a"}\n"\xe9"', r"late\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        "rows.jsonl.gz": (b"", "unpack it first"),
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

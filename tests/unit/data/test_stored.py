"""Records left on disk are the records in memory, split by split, and made once."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibtrain.config import FileSource, RunConfig
from calibtrain.data import stored
from calibtrain.data.drops import DropReport
from calibtrain.data.lazy import Lazy
from calibtrain.data.sources import load_records
from calibtrain.data.stored import Made, StoredRecords, stored_records
from calibtrain.errors import UserError
from calibtrain.pipeline import prepare as preparing
from calibtrain.pipeline.prepare import prepare
from calibtrain.tasks.short_answer import SHORT_ANSWER

SIZES = {"train": None, "validation": 9, "calibration": 20, "temperature": 20, "certification": 20, "test": 20}


def rows():
    """Graded questions of two topics, some of them twice, and some rows without what is needed."""
    for i in range(600):
        row = {"question": f"What is {i}?", "answers": [f"{i}", f"no. {i}"], "topic": "abc"[i % 5 % 3], "note": f"{i}"}
        yield row
        if i % 50 == 0:
            yield row
            yield {**row, "answers": [f"also {i}"]}
        if i % 60 == 0:
            yield {"question": f"Why {i}?", "topic": "a"}
            yield {"prompt": f"Say {i}.", "completion": "\ud83dx", "topic": "a"}
            yield {"prompt": f"Tell {i} é \u2028.", "completion": "I do.", "topic": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def config(folder, streaming, name="rows.jsonl", splits=SIZES, **data):
    columns = {"strata": ["topic"], "fields": ["note"], "context": "note"}
    source = {"kind": "file", "path": str(folder / name), "columns": columns, "streaming": streaming}
    return RunConfig.model_validate(
        {"data": {"source": source, "splits": splits, "few_shot_raw": 3, **data}, "objective": {"name": "sft"}}
    )


def found(prepared):
    return {name: list(some) for name, some in prepared.splits.items()}


CASES = {
    "all": {},
    "examples": {"few_shot": 4},
    "train alone": {"splits": {name: None if name == "train" else 0 for name in SIZES}},
    "some not asked for": {"splits": {**SIZES, "test": 0, "validation": 0, "train": 30}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_splits_are_those_in_memory(folder, tmp_path, monkeypatch, case):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path))
    changes = CASES[case]
    stored, loaded = (prepare(config(folder, streaming, **changes)) for streaming in (True, False))
    assert isinstance(stored.splits["train"], StoredRecords)
    assert found(stored) == found(loaded)
    assert stored.shots == loaded.shots
    assert (stored.read, stored.available) == (loaded.read, loaded.available)
    assert sorted(stored.drops.lines()) == sorted(loaded.drops.lines())
    assert stored.drops.unfit == loaded.drops.unfit
    assert stored.composition == loaded.composition
    assert stored.data_hash == prepare(config(folder, True, **changes)).data_hash


def test_without_locks_two_that_read_at_once_write_apart(folder, tmp_path, monkeypatch):
    """As two machines do, whose process ids may be the same, on a file system that knows no locks."""
    both, directory = Barrier(2, timeout=20), tmp_path / "records"

    def survey(*given, plain=stored._survey):
        both.wait()
        assert len(list(directory.glob("*.part-*"))) == 2
        both.wait()
        return plain(*given)

    monkeypatch.setattr(stored, "_survey", survey)
    monkeypatch.setattr(stored, "one_at_a_time", lambda path: nullcontext(False))
    source = FileSource(kind="file", path=folder / "rows.jsonl")
    made = Made(0, False, "", lambda record: record, lambda record: True)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: list(stored_records(source, made, directory, DropReport())), range(2)))
    assert found[0] == found[1] != []
    assert not list(directory.glob("*.part-*"))


def test_graded_questions_may_have_a_source_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path))
    questions = {"kind": "file", "path": str(folder / "asked.jsonl")}
    asked = [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(400)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    stored, loaded = (prepare(config(folder, streaming, questions=questions)) for streaming in (True, False))
    assert found(stored) == found(loaded)
    assert (stored.read, stored.graded) == (loaded.read, loaded.graded)
    assert not {one.id for one in stored.splits["train"]} & {one.id for one in stored.splits["test"]}


def made(**changes):
    whole = {"seed": 0, "labelled": False, "task": "{}", "asked": lambda one: one, "gradable": SHORT_ANSWER.gradable}
    return Made(**{**whole, **changes})


def test_a_conversation_that_teaches_a_held_out_question_is_left_out_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    graded = [{"question": f"What is {i}?", "answers": [str(i)]} for i in range(200)]

    def talk(i):
        asked = [f"What is {i}?", f"And what of {i}?"]
        said = [(role, text) for one in asked for role, text in (("user", one), ("assistant", f"{i}."))]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(talk(i)) + "\n" for i in range(200)))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    sizes = {"train": None, "calibration": 0, "temperature": 10, "certification": 10, "test": 10}
    own = {"kind": "file", "path": str(tmp_path / "asked.jsonl")}
    there, here = (
        prepare(
            RunConfig.model_validate(
                {
                    "data": {
                        "source": {"kind": "file", "path": str(tmp_path / "rows.jsonl"), "streaming": streaming},
                        "questions": own,
                        "splits": sizes,
                    },
                    "objective": {"name": "sft"},
                    "penalties": [],
                }
            )
        )
        for streaming in (True, False)
    )
    kept = {record.id for record in here.splits["train"]}
    assert {record.id for record in there.splits["train"]} == kept
    held = {record.id for name in ("temperature", "certification", "test") for record in here.splits[name]}
    assert 0 < len(kept) < 200
    assert all(held.isdisjoint(record.taught) for record in there.splits["train"])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
def test_every_format_is_kept_as_it_is_read(tmp_path, suffix):
    path, some = tmp_path / f"rows{suffix}", [{"question": f"q{i}", "answers": f"{i}.0"} for i in range(50)]
    if suffix == ".csv":
        path.write_text("question,answers\n" + "".join(f"{row['question']},{row['answers']}\n" for row in some))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(some), path)
    else:
        path.write_text(json.dumps(some) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in some))
    source = FileSource(kind="file", path=path)
    kept = stored_records(source, made(), tmp_path / "cache", DropReport())
    assert list(kept) == load_records(source)
    assert list(kept[5:9]) == load_records(source)[5:9]
    assert kept[-1] == load_records(source)[-1]


def test_it_is_made_once_and_anew_where_the_file_the_seed_or_the_task_changes(tmp_path, monkeypatch):
    path, builds = tmp_path / "rows.jsonl", []
    path.write_text('{"question": "q", "answers": ["a"]}\n')
    make = stored._make
    monkeypatch.setattr(stored, "_make", lambda *args: (builds.append(args[2]), make(*args)))
    source = FileSource(kind="file", path=path)
    for changes in ({}, {}, {"seed": 1}, {"task": '{"kind": "other"}'}, {}):
        stored_records(source, made(**changes), tmp_path / "cache", DropReport())
    assert len(builds) == len(set(builds)) == 3
    path.write_text('{"question": "q", "answers": ["b"]}\n')
    os.utime(path, ns=(1, 1))
    assert stored_records(source, made(), tmp_path / "cache", DropReport())[0].chosen == "b"
    assert not [
        one for one in (tmp_path / "cache").iterdir() if "." in one.name and one.suffix != ".lock"
    ]  # nothing half made is left


def test_what_cannot_be_read_is_told_as_ever(tmp_path):
    source = FileSource(kind="file", path=tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="no such file"):
        stored_records(source, made(), tmp_path / "cache", DropReport())
    for text, words in (("", "is empty"), ('{"words": 1}\n', "columns found are words"), ("{\n", ":1: not JSON")):
        source.path.write_text(text)
        with pytest.raises(UserError, match=words):
            stored_records(source, made(), tmp_path / "cache", DropReport())
    source.path.write_text('{"question": "q", "answers": ["a"]}\n{"question": "q"}\n')
    drops = DropReport()
    assert len(stored_records(source, made(), tmp_path / "cache", drops)) == 1
    assert drops.unfit[0].place.endswith("rows.jsonl:2")
    with pytest.raises(UserError, match=":2: the row has no answer"):
        stored_records(source, made(), tmp_path / "cache", DropReport(strict=True))


def test_a_lazy_sequence_is_one():
    asked = []
    some = Lazy(5, lambda place: (asked.append(place), place * place)[1], kept=2)
    assert (len(some), some[2], some[2], some[-1], some[1:3], list(some)) == (5, 4, 4, 16, [1, 4], [0, 1, 4, 9, 16])
    assert asked[:2] == [2, 4]
    with pytest.raises(IndexError):
        some[5]


def test_where_the_whole_set_is_needed_it_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path))
    values = config(folder, True).model_dump()
    for name in ("kto", "grpo", "dpo"):
        with pytest.raises(ValueError, match=r"data\.source\.streaming"):
            RunConfig.model_validate({**values, "objective": {"name": name}})
    one = RunConfig.model_validate({**values, "objective": {"name": "orpo"}})
    with pytest.raises(UserError, match="no row has a rejected answer"):
        preparing.prepare(one)
    with pytest.raises(ValueError, match="not in a mixture and not as `questions`"):
        config(folder, True, questions=values["data"]["source"])

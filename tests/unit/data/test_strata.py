"""Strata of the user's own, from the columns of a file to the sets and claims that use them."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from calibtrain.config import FileSource, HubSource, RunConfig
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError
from calibtrain.pipeline.prepare import prepare

TOPICS = ("law", "law", "law", "medicine", None)


def rows(count=400):
    return [
        {"question": f"q{i}", "answers": [f"a{i}"], "topic": TOPICS[i % 5], "year": 2020.0 + i % 2, "row": i}
        for i in range(count)
    ]


def write(path, content):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".csv":
        lines = [f"{r['question']},{r['answers'][0]},{r['topic'] or ''},{r['year']},{r['row']}" for r in content]
        path.write_text("question,answers,topic,year,row\n" + "\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def config(path, strata=("topic", "year"), **sections):
    sizes = {"calibration": 20, "temperature": 20, "certification": 20, "test": 20}
    source = {"kind": "file", "path": path, "columns": {"strata": list(strata)} if strata else {}}
    return RunConfig.model_validate({"data": {"source": source, "splits": sizes}, **sections})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_columns_become_strata_in_every_format(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", rows())
    source = FileSource(kind="file", path=path, columns={"strata": ["topic", "year"]})
    counts = Counter((one.strata["topic"], one.strata["year"]) for one in load_records(source))
    assert set(counts.values()) <= {40, 80, 120}
    assert {topic for topic, _ in counts} == {"law", "medicine", "unknown"}
    assert {year for _, year in counts} == {"2020", "2021"}


def test_columns_of_a_hub_set_become_strata(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter(rows(10)))
    found = load_records(HubSource(kind="hub", name="some/set", columns={"strata": ["topic"]}))
    assert Counter(one.strata["topic"] for one in found) == {"law": 6, "medicine": 2, "unknown": 2}


def test_the_calibration_set_has_the_makeup_of_the_strata(tmp_path):
    prepared = prepare(config(write(tmp_path / "rows.jsonl", rows()), ["topic"]))
    counts = Counter(one.strata["topic"] for one in prepared.splits["calibration"])
    assert counts["law"] == pytest.approx(12, abs=3)
    [distance] = prepared.composition.strata
    assert distance.key == "topic"
    assert distance.source_shares == pytest.approx({"law": 0.6, "medicine": 0.2, "unknown": 0.2})


def test_a_column_of_ids_is_refused_and_small_strata_are_warned_of(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", rows())
    with pytest.raises(UserError, match=r"'row', which has 400 values in 400 rows.*column with few values"):
        prepare(config(path, ["row"]))
    write(path, [{**row, "row": row["row"] // 5} for row in rows()])
    prepare(config(path, ["row"]))
    assert "'row', which has 80 values in 400 rows: too few questions each" in caplog.text


@pytest.mark.parametrize("value", [["a"], {"a": 1}, float("inf")])
def test_a_stratum_is_a_single_value(tmp_path, value):
    path = write(tmp_path / "rows.jsonl", [*rows(2), {**rows(1)[0], "topic": value}])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: column 'topic' holds .*a stratum is text or a number"):
        prepare(config(path))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"calibration": {"method": "domain_temperature", "domain": "subject"}}, r"calibration\.domain"),
        ({"abstention": {"groups": "subject"}}, r"abstention\.groups"),
    ],
)
def test_a_stratum_that_no_record_has_is_told_with_those_found(tmp_path, sections, key):
    path = write(tmp_path / "rows.jsonl", rows())
    with pytest.raises(UserError, match=rf"{key}: no record has the stratum 'subject'; .*found are topic, year"):
        prepare(config(path, **sections))
    with pytest.raises(UserError, match=rf"{key}: .*found are none"):
        prepare(config(path, (), **sections))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"strata": "topic"}, "strata: a list of columns"),
        ({"answers": ["a"]}, "answers: one column"),
        ({"strata": ["topic", "topic"]}, "names a column twice"),
    ],
)
def test_only_strata_is_a_list(columns, message):
    with pytest.raises(ValidationError, match=message):
        FileSource(kind="file", path="x.jsonl", columns=columns)


def test_a_stratum_names_a_column_that_exists(tmp_path):
    with pytest.raises(UserError, match=r"columns\.strata names 'subject'; the columns found are question, answers"):
        prepare(config(write(tmp_path / "rows.jsonl", rows()), ["subject"]))


def test_what_is_used_of_what_is_read_is_told(tmp_path):
    prepared = prepare(config(write(tmp_path / "rows.jsonl", rows())))
    assert prepared.read == 400
    assert prepared.available["train"] == len(prepared.splits["train"]) > 150
    assert prepared.lines()[0] == "400 rows read"
    assert f"test: 20 of the {prepared.available['test']} records of this split" in prepared.lines()
    assert sum(prepared.available.values()) == 400

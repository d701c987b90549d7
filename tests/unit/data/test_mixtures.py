import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.config import AbstentionConfig, RunConfig
from calibtrain.config_data import MixtureSource
from calibtrain.data.mixtures import STRATUM, drawn, interleaved, mixture_lines, turns
from calibtrain.errors import UserError
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Message, Record


def mixture(weights, **more):
    parts = [
        {"source": {"kind": "file", "path": f"{name}.jsonl"}, "weight": weight, "name": name}
        for name, weight in weights.items()
    ]
    return MixtureSource.model_validate({"kind": "mixture", "sources": parts, **more})


def records(**counts):
    return [
        Record((Message("user", f"{name} {i}"),), chosen="x", strata={STRATUM: name})
        for name, count in counts.items()
        for i in range(count)
    ]


def of(found):
    return Counter(record.strata[STRATUM] for record in found)


@settings(max_examples=40)
@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=6), st.integers(0, 9))
def test_every_prefix_has_the_weights_shares(weights, seed):
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    bound, taken = (1 if len(weights) == 2 else len(weights)), Counter()
    for n, name in enumerate(islice(turns(named, seed), 400), start=1):
        taken[name] += 1
        for one, weight in named.items():
            assert abs(taken[one] - n * weight / sum(weights)) <= bound + 1e-9
    assert list(islice(turns(named, seed), 50)) == list(islice(turns(named, seed), 50))


def test_a_draw_stops_where_a_source_is_used_up_or_begins_it_anew():
    pool, weights = records(big=100, small=10), {"big": 3, "small": 1}
    stopped = drawn(pool, mixture(weights), seed=0)
    assert of(stopped)["small"] == 10
    assert 29 <= of(stopped)["big"] <= 33
    assert len({record.id for record in stopped}) == len(stopped)
    repeated = drawn(pool, mixture(weights, exhausted="repeat"), seed=0)
    assert of(repeated)["big"] == 100
    assert 32 <= of(repeated)["small"] <= 34
    assert repeated[: len(stopped)] == stopped
    assert len({record.id for record in repeated}) == 110
    assert drawn(pool, mixture(weights, exhausted="repeat"), seed=0, size=500)[: len(repeated)] == repeated
    lines = mixture_lines(pool, repeated, mixture(weights, exhausted="repeat"))
    assert any((line.startswith("train, small: 3") and "3.3 times" in line) or "3.4 times" in line for line in lines)
    assert "train ends where small is used up (exhausted: repeat goes on)" in mixture_lines(
        pool, stopped, mixture(weights)
    )
    with pytest.raises(UserError, match="'small' has no record"):
        drawn(records(big=5), mixture(weights), seed=0)


def test_all_records_interleaved_once():
    pool = records(big=90, small=10)
    found = interleaved(pool, mixture({"big": 1, "small": 1}), seed=1)
    assert sorted(record.id for record in found) == sorted(record.id for record in pool)
    assert of(found[:20])["small"] == 10


def config(folder, splits, **changes):
    source = {
        "kind": "mixture",
        "sources": [
            {"source": {"kind": "file", "path": str(folder / "cities.jsonl")}, "weight": 3},
            {"source": {"kind": "file", "path": str(folder / "sums.jsonl")}, "weight": 1},
        ],
        **changes,
    }
    return RunConfig.model_validate({"data": {"source": source, "splits": splits}, "objective": {"name": "sft"}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files; fifty questions of the second stand in the first as well."""
    path = tmp_path_factory.mktemp("mixture")
    cities = [{"question": f"Where is {i}?", "answers": ["here"]} for i in range(1500)]
    sums = [{"question": f"What is {i} + 1?", "answers": [f"{i + 1}"]} for i in range(1500)]
    for name, rows in (("cities", cities + sums[:50]), ("sums", sums)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SIZES = {"train": 400, "calibration": 40, "temperature": 80, "certification": 80, "test": 80}


def test_each_split_has_the_shares_and_none_shares_a_question(folder):
    prepared = prepare(config(folder, SIZES))
    for name, some in prepared.splits.items():
        if some:
            assert of(some)["cities"] / len(some) == pytest.approx(0.75, abs=0.03), name
    ids = [record.id for some in prepared.splits.values() for record in some]
    assert len(set(ids)) == len(ids) == sum(SIZES.values())
    assert prepared.read == 3050
    assert not [one for one in prepared.composition.strata if one.farther_than_chance]
    assert any(line.startswith("train, cities: 300 records (75.0%), of 7") for line in prepared.lines())
    grouped = config(folder, SIZES).model_copy(update={"abstention": AbstentionConfig(groups=STRATUM)})
    assert of(prepare(grouped).splits["certification"])["sums"] == 20  # a certificate by source has its answers
    again = prepare(config(folder, SIZES))
    assert [record.id for record in again.splits["train"]] == [record.id for record in prepared.splits["train"]]


def test_training_may_repeat_and_evaluation_never_does(folder):
    prepared = prepare(config(folder, {**SIZES, "train": 3000}, exhausted="repeat"))
    assert len(prepared.splits["train"]) == 3000
    assert of(prepared.splits["train"])["cities"] == pytest.approx(2250, abs=2)
    assert any(line.startswith("train, cities: 2250 records") and line.endswith("times") for line in prepared.lines())
    tested = prepared.splits["test"]
    assert len({record.id for record in tested}) == len(tested)
    with pytest.raises(UserError, match=r"data\.splits\.train: 3000 asked for"):
        prepare(config(folder, {**SIZES, "train": 3000}))


def test_names_and_the_stratum_are_told_apart(folder):
    part = {"source": {"kind": "file", "path": "a/x.jsonl"}}
    with pytest.raises(ValueError, match="two sources are named 'x'"):
        MixtureSource.model_validate(
            {"kind": "mixture", "sources": [part, {"source": {"kind": "file", "path": "b/x.csv"}}]}
        )
    (folder / "own.jsonl").write_text('{"question": "q", "answers": ["a"], "source": "web"}\n')
    own = {"kind": "file", "path": str(folder / "own.jsonl"), "columns": {"strata": ["source"]}}
    one = config(
        folder, SIZES, sources=[{"source": own}, {"source": {"kind": "file", "path": str(folder / "sums.jsonl")}}]
    )
    with pytest.raises(UserError, match=r"own\.jsonl: columns\.strata names 'source'"):
        prepare(one)
    assert config(folder, SIZES).data.source.called == "cities.jsonl and sums.jsonl"

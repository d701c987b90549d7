"""Unpaired preferences: what a label says, pairs taken apart, and answers put behind other prompts."""

import json

import pytest

from calibtrain.config import FileSource, SplitSizes
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_records
from calibtrain.data.sources import load_records
from calibtrain.data.splits import split_records
from calibtrain.data.templates import Template
from calibtrain.data.unpaired import mismatched, unpair
from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, REJECTED
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer

ONLY_TRAIN = SplitSizes(calibration=0, temperature=0, certification=0, test=0)


def load(tmp_path, rows, suffix=".jsonl", labelled=True, **columns):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    return load_records(FileSource(kind="file", path=path, columns=columns), labelled=labelled)


def said(records):
    return {record.question: (record.chosen, record.rejected) for record in records}


def record(prompt, chosen=None, rejected=None):
    return Record((Message("user", prompt),), chosen, rejected, origin=prompt)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("labels", [(True, False), (1, 0), ("true", "False"), (1.0, 0.0)])
def test_a_label_says_which_answers_are_desirable(tmp_path, labels, suffix):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]
    assert said(load(tmp_path, rows, suffix)) == {"q0": ("a0", None), "q1": (None, "a1")}


def test_a_label_of_any_single_answer_and_mapped(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert said(load(tmp_path, [{"messages": turns, "label": False}])) == {"q": (None, "a")}
    row = {"prompt": "q", "completion": "a", "thumbs_up": False}
    assert said(load(tmp_path, [row], label="thumbs_up", labelled=False)) == {"q": (None, "a")}
    graded = {"prompt": "q", "completion": "a", "label": False, "answers": ["b"]}
    assert said(load(tmp_path, [graded])) == {"q": (None, "a")}  # the accepted answer is no answer to learn here


def test_a_label_that_nobody_asks_for_is_left_alone(tmp_path):
    row = {"prompt": "q", "completion": "a", "label": "sports"}
    assert said(load(tmp_path, [row], labelled=False)) == {"q": ("a", None)}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "label": "sports"}
    assert said(load(tmp_path, [pair])) == {"q": ("a", "b")}


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("good", "rows.jsonl:2: label holds 'good'; it says whether the answer is desirable, true or false"),
        (2, "rows.jsonl:2: label holds 2"),
        ([True], "rows.jsonl:2: label holds"),
        (None, "rows.jsonl:2: the row has no label"),
    ],
)
def test_a_label_that_says_nothing_is_named(tmp_path, label, problem):
    good = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(UserError, match=problem):
        load(tmp_path, [good, {**good, "label": label}])


def test_without_a_label_the_columns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"columns found are prompt, completion; .* a `label`.*label: your_column"):
        load(tmp_path, [{"prompt": "q", "completion": "a"}])
    assert said(load(tmp_path, [{"question": "q", "answers": ["a"]}])) == {"q": ("a", None)}


def test_undesirable_answers_train_only_where_they_are_asked_for():
    records = [record("q0", "a"), record("q1", None, "b"), record("q2", "c", "d")]
    drops = DropReport()
    assert split_records(records, ONLY_TRAIN, 0, undesirable=True)["train"] == records
    assert split_records(records, ONLY_TRAIN, 0, drops=drops)["train"] == [records[0], records[2]]
    assert drops.total == 1
    assert "no answer to learn" in drops.lines()[0]


def test_pairs_are_taken_apart():
    drops = DropReport()
    records = [record("q0", "a", "b"), record("q1", "c"), record("q2", "same", "same"), record("q3", None, "d")]
    found = [(one.question, one.chosen, one.rejected) for one in unpair(records, drops)]
    assert found == [("q0", "a", None), ("q0", None, "b"), ("q1", "c", None), ("q3", None, "d")]
    assert drops.total == 1
    assert "the same answer" in drops.lines()[0]


def encoded(prompts, max_length=64):
    template = Template("plain", tiny_tokenizer())
    records = [record(p, *((f"answer {i}", None) if i % 2 else (None, f"reply {i}"))) for i, p in enumerate(prompts)]
    examples = encode_records(records, template, max_length, False, DropReport(), unpaired=True)
    return [one for (one,) in examples]


def test_each_answer_has_its_role():
    assert [one.role for one in encoded("abcd")] == [REJECTED, CHOSEN, REJECTED, CHOSEN]
    assert all(one.pair_id == -1 for one in encoded("ab"))


@pytest.mark.parametrize("prompts", ["abcde", "aabbbca", "abababaa", "aab", "baaaaaaa", "aabbccdd", "abcabcaa"])
def test_mismatched_answers_belong_to_other_prompts(prompts):
    examples = encoded(prompts)
    found = mismatched(examples, 64, None)
    starts = [one.ids[: one.completion_start] for one in examples]
    answers = [one.ids[one.completion_start :] for one in examples]
    owners = [answers.index(one.ids[one.completion_start :]) for one in found]
    assert [one.ids[: one.completion_start] for one in found] == starts
    assert all(starts[owner] != start for owner, start in zip(owners, starts, strict=True))
    if all(2 * prompts.count(one) <= len(prompts) for one in prompts):
        assert sorted(owners) == list(range(len(prompts)))  # desirable and undesirable ones as they are


def test_mismatched_prompts_are_cut_to_fit():
    examples = encoded(["a", "word " * 40], max_length=30)
    found = mismatched(examples, 30, None)
    assert max(len(one.ids) for one in found) <= 30
    assert [one.record_id for one in found] == [0, 1]


def test_one_prompt_for_all_is_refused():
    with pytest.raises(UserError, match="all training records have the same prompt"):
        mismatched(encoded("aaa"), 64, None)

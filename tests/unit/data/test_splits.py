from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.config import SplitSizes
from calibtrain.data.drops import DropReport
from calibtrain.data.splits import EVALUATION_SPLITS, SHARES, split_of, split_records
from calibtrain.errors import UserError
from calibtrain.records import Message, Record, unit_hash


def record(i, **fields):
    fields = {"chosen": "a", "accepted": ("a",), **fields}
    return Record(prompt=(Message("user", f"question {i}"),), origin=f"row {i}", **fields)


RECORDS = [record(i) for i in range(2000)]
SIZES = SplitSizes(train=300, calibration=40, temperature=50, certification=60, test=70)


def ids_of(rows, split):
    return sum(split_of(one.id, 0) == split for one in rows)


def ids(records):
    return {one.id for one in records}


def test_unit_hash_is_fixed_and_uniform():
    assert unit_hash("split", 0, "abc") == 0.23447910748204248
    values = [unit_hash("x", i) for i in range(4000)]
    assert all(0 <= value < 1 for value in values)
    counts = Counter(int(10 * value) for value in values)
    assert min(counts.values()) > 330
    assert max(counts.values()) < 470


def test_shares_are_those_declared():
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = Counter(split_of(one.id, 0) for one in RECORDS)
    for name, share in SHARES.items():
        assert counts[name] / len(RECORDS) == pytest.approx(share, abs=0.03)


def test_sizes_are_met_and_splits_are_disjoint():
    splits = split_records(RECORDS, SIZES, seed=0)
    assert {name: len(some) for name, some in splits.items()} == SIZES.model_dump()
    assert len(set().union(*map(ids, splits.values()))) == sum(SIZES.model_dump().values())


@settings(max_examples=30)
@given(st.integers(0, 3), st.lists(st.integers(0, 120), min_size=10, max_size=10))
def test_no_question_changes_split_whatever_the_sizes(seed, numbers):
    names = list(SHARES)
    one = split_records(RECORDS, SplitSizes(**dict(zip(names, numbers[:5], strict=True))), seed)
    two = split_records(RECORDS, SplitSizes(**dict(zip(names, numbers[5:], strict=True))), seed)
    for a in names:
        for b in names:
            if a != b:
                assert not ids(one[a]) & ids(two[b])
    for name in names:
        if name != "calibration":  # a stratified choice; the others are prefixes of one another
            short, long = sorted((one[name], two[name]), key=len)
            assert long[: len(short)] == short


def test_a_split_that_cannot_be_filled_says_how_many_there_are():
    with pytest.raises(UserError, match=r"data\.splits\.test: 900 asked for, but only \d+ .*at most \d+"):
        split_records(RECORDS, SplitSizes(train=1, calibration=0, temperature=0, certification=0, test=900), 0)
    ungraded = [record(i, accepted=()) for i in range(100)]
    with pytest.raises(UserError, match=r"calibration: 10 asked for, but only 0.*answers"):
        split_records(ungraded, SplitSizes(train=1, calibration=10, temperature=0, certification=0, test=0), 0)
    assert len(
        split_records(ungraded, SplitSizes(train=9, calibration=0, temperature=0, certification=0, test=0), 0)["train"]
    )


def test_the_calibration_split_has_the_makeup_of_the_draw_at_its_depth():
    # The head comes first, as in a draw by popularity: its share is 1 at the top and 0 at the bottom.
    def band(i):
        return "head" if unit_hash("band", i) > i / 4000 else "tail"

    drawn = [record(i, strata={"band": band(i)}) for i in range(4000)]
    sizes = SplitSizes(train=0, calibration=100, temperature=0, certification=0, test=150)
    splits = split_records(drawn, sizes, 0)
    depth = round(4000 * 100 / sum(split_of(one.id, 0) == "calibration" for one in drawn))
    head = sum(one.strata["band"] == "head" for one in drawn[:depth]) / depth
    assert sum(one.strata["band"] == "head" for one in splits["calibration"]) == pytest.approx(100 * head, abs=1)


def test_every_row_of_a_question_trains_and_is_asked_once():
    drops = DropReport()
    rows = [*RECORDS, *(record(i, chosen="b") for i in range(200)), *(record(i) for i in range(200))]
    splits = split_records(rows, SIZES.model_copy(update={"train": None}), 0, drops=drops)
    learned = [i for i in range(2000) if split_of(record(i).id, 0) == "train"]
    again = sum(i < 200 for i in learned)
    assert 50 < again < 150
    assert Counter(one.chosen for one in splits["train"]) == {"a": len(learned), "b": again}
    assert drops.dropped == {"the same row again": again, "question asked before": 2 * (200 - again)}
    for name in EVALUATION_SPLITS:
        assert len(ids(splits[name])) == len(splits[name]) == getattr(SIZES, name)
        assert not ids(splits[name]) & ids(splits["train"])


def test_four_pairs_a_prompt_all_train():
    def pair(i):
        return Record((Message("user", f"Write line {i // 4}."),), f"A fine line {i}.", f"bad {i}", origin=f"row {i}")

    pairs = [pair(i) for i in range(200)]
    sizes = SplitSizes(calibration=0, temperature=0, certification=0, test=0)
    drops = DropReport()
    splits = split_records(pairs, sizes, 0, drops=drops)
    assert len(splits["train"]) == 200  # no evaluation split is asked for: nothing is held out
    assert drops.total == 0
    assert len(split_records(pairs, sizes, 0, questions=RECORDS)["train"]) == 200
    doubled = [*pairs, *pairs]
    with pytest.raises(
        UserError, match=r"train: 300 asked for.*bring more data \(of all rows, 200 dropped: the same row"
    ):
        split_records(doubled, sizes.model_copy(update={"train": 300}), 0)


def test_train_takes_all_by_default_and_what_is_not_used_is_told():
    assert SplitSizes().train is None
    drops = DropReport()
    whole = split_records(RECORDS, SIZES.model_copy(update={"train": None}), 0, drops=drops)
    assert len(whole["train"]) == sum(split_of(one.id, 0) == "train" for one in RECORDS)
    assert drops.lines() == []
    split_records(RECORDS, SIZES, 0, drops=drops)
    assert drops.lines() == [
        f"{len(whole['train']) - 300} not trained on: data.splits.train asks for fewer (null takes all)"
    ]


def test_ungraded_rows_of_a_split_that_grades_are_counted():
    rows = [record(i, accepted=("a",) if i % 2 else ()) for i in range(2000)]
    drops = DropReport()
    splits = split_records(rows, SplitSizes(calibration=40, temperature=0, certification=0, test=0), 0, drops=drops)
    pool = [one for one in rows if split_of(one.id, 0) == "calibration"]
    told = {f"of the {name} split, which is not asked for": ids_of(rows, name) for name in EVALUATION_SPLITS[1:]}
    assert drops.dropped == {"no accepted answers to grade by": sum(not one.accepted for one in pool)} | told
    assert all(one.accepted for one in splits["calibration"])


def test_training_records_whose_question_is_held_out_are_excluded():
    drops = DropReport()
    questions = [record(i, chosen=None) for i in range(1000)]
    train = [record(i, rejected="b", accepted=()) for i in range(500, 1500)]
    sizes = SplitSizes(train=500, calibration=20, temperature=30, certification=40, test=50)
    splits = split_records(train, sizes, 0, questions=questions, drops=drops)
    held_out = set().union(*(ids(splits[name]) for name in EVALUATION_SPLITS))
    assert not ids(splits["train"]) & ids(questions)
    assert len(held_out) == 140
    assert drops.dropped == {"question held out for evaluation": 500}
    # What is not asked for holds nothing out.
    only_train = SplitSizes(train=1000, calibration=0, temperature=0, certification=0, test=0)
    assert len(split_records(train, only_train, 0, questions=questions)["train"]) == 1000


def test_all_records_may_train_when_questions_have_their_own_source():
    questions = [record(i + 10_000) for i in range(1000)]
    sizes = SplitSizes(train=2000, calibration=20, temperature=30, certification=40, test=50)
    assert split_records(RECORDS, sizes, 0, questions=questions)["train"] == RECORDS
    with pytest.raises(UserError, match=r"train: 2001 asked for, but only 2000 .*always 100%"):
        split_records(RECORDS, sizes.model_copy(update={"train": 2001}), 0, questions=questions)


@pytest.mark.parametrize("separate", [False, True])
def test_held_out_records_come_out_of_train_and_move_nothing_else(separate):
    questions = [record(i) for i in range(1500, 3500)] if separate else None
    whole = split_records(RECORDS, SIZES.model_copy(update={"train": None}), 0, questions)
    some = split_records(RECORDS, SIZES.model_copy(update={"train": None, "validation": 30}), 0, questions)
    more = split_records(RECORDS, SIZES.model_copy(update={"train": None, "validation": 60}), 0, questions)
    assert all(some[name] == whole[name] == more[name] for name in EVALUATION_SPLITS)
    assert some["train"] == more["train"]  # asking for more takes nothing from training
    assert some["validation"] == more["validation"][:30]
    assert ids(some["train"]) < ids(whole["train"])
    assert ids(more["validation"]) < ids(whole["train"]) - ids(some["train"])
    assert 0.05 < 1 - len(some["train"]) / len(whole["train"]) < 0.15
    with pytest.raises(UserError, match=r"data\.splits\.validation: 900 asked for, but only"):
        split_records(RECORDS, SIZES.model_copy(update={"validation": 900}), 0, questions)


def test_a_run_that_only_trains_may_hold_records_out():
    sizes = SplitSizes(train=None, validation=20, calibration=0, temperature=0, certification=0, test=0)
    splits = split_records(RECORDS, sizes, 0)
    assert len(splits["validation"]) == 20
    assert not ids(splits["validation"]) & ids(splits["train"])
    assert len(splits["train"]) > 1700


def test_spare_questions_are_in_no_split_and_taught_by_none():
    drops = DropReport()
    splits = split_records(RECORDS, SIZES, 0, drops=drops, spare=True)
    names = ("train", "calibration", "temperature", "certification", "test")
    taken = {key for name in names for record in splits[name] for key in record.taught}
    asked = [record.key for record in drops.spare]
    assert len(set(asked)) == len(asked) > 0
    assert taken.isdisjoint(asked)
    wide = SIZES.model_copy(update={"train": None, "calibration": 0})
    held_out = {split_of(record.key, 0) for record in drops.spare}
    assert held_out == {"train", "calibration"}  # never of a split that certifies or tests
    assert {record.key for record in split_records(RECORDS, wide, 0)["train"]} - taken <= set(asked)
    drops = DropReport()
    split_records(RECORDS, SIZES, 0, drops=drops)
    assert drops.spare == []


def test_a_question_under_two_system_texts_is_asked_once_by_every_evaluation_split():
    """Its answers are no two independent ones: counted twice they would certify too often."""
    records = [
        Record((Message("system", s), Message("user", f"What is {i}+{i}?")), chosen=str(2 * i), accepted=(str(2 * i),))
        for i in range(300)
        for s in ("You are terse.", "You are kind.")
    ]
    drops = DropReport()
    found = split_records(
        records, SplitSizes(train=50, calibration=10, temperature=20, certification=30, test=20), 0, drops=drops
    )
    for name in ("calibration", "temperature", "certification", "test"):
        assert len({one.key for one in found[name]}) == len(found[name])
    assert any("question asked before" in line for line in drops.lines())
    assert len({one.key for one in found["train"]}) < len(found["train"])  # each of its rows teaches something else


def test_one_stem_with_other_options_is_another_question_and_in_another_order_the_same():
    def asked(*options):
        return Record((Message("user", "Which of these is true?"),), options=options)

    assert asked("a", "b").key == asked("b", "a").key
    assert asked("a", "b").key != asked("a", "c").key
    assert asked("a", "b").key != asked("ab").key
    assert Record((Message("user", "Which of these is true?"),)).key == asked().key

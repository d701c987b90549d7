from dataclasses import replace

import pytest

from calibtrain.data.summary import data_hash, describe
from calibtrain.records import Message, Record

RECORDS = [
    Record((Message("user", f"q{i}"),), "a", "b" if i < 2 else None, ("a",), {"continent": "Asia" if i else "Europe"})
    for i in range(4)
]


def test_the_hash_is_of_contents_not_of_order_or_origin():
    assert data_hash(RECORDS) == data_hash(RECORDS[::-1])
    assert data_hash(RECORDS) == data_hash([replace(RECORDS[0], origin="elsewhere"), *RECORDS[1:]])
    assert len(data_hash([])) == 64


@pytest.mark.parametrize(
    "change",
    [{"chosen": "c"}, {"rejected": None}, {"accepted": ("a", "c")}, {"prompt": (Message("system", "q0"),)}],
)
def test_any_change_of_contents_changes_the_hash(change):
    assert data_hash([replace(RECORDS[0], **change), *RECORDS[1:]]) != data_hash(RECORDS)


def test_describe():
    found = describe(RECORDS)
    assert (found["n"], found["pairs"], found["graded"]) == (4, 2, 4)
    assert found["strata"] == {"continent": {"Asia": 0.75, "Europe": 0.25}}
    assert found["data_hash"] == data_hash(RECORDS)
    assert describe([])["strata"] == {}


def test_ids_ignore_whitespace_and_nothing_else():
    def of(text, role="user"):
        return Record((Message(role, text),)).id

    assert of("a  b\n") == of("a b")
    assert len({of("a b"), of("A b"), of("ab"), of("a b", "system")}) == 4

"""Sentences of a paragraph: what ends one, and what does not."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.tasks.sentences import sentences


def split(text):
    return [text[start:stop] for start, stop in sentences(text)]


@pytest.mark.parametrize(
    "wanted",
    [
        ["Paris is the capital of France.", "Rome is the capital of Italy."],
        ["It grew by 3.5 percent.", "Then it fell."],
        ["Dr. Smith met J. R. Jones at St. Pancras.", "They left at 5 p.m."],
        ["It lies in the U.S. state of Ohio.", "It is small."],
        ["He moved to the U.S.", "It was 1990."],
        ["See example.org for more.", "It is free."],
        ["Really?", "Yes!", "Good."],
        ['He said "no."', "She left."],
        ["He paid 1,000.50 dollars (about 900 euros).", "Then he left."],
        ["It is of Acme Inc. and others.", "It is old."],
        ["They cost ca. 20 francs, e.g. in Bern.", "No. 5 is dear."],
        ["Wait... what is it?", "Nothing."],
        ["So it ended…", "Then came 2020."],
        ["東京は日本の首都です。", "パリはフランスの首都です。"],
        ["他说：“好！”", "然后走了。"],
        ["Москва — столица России.", "Киев — столица Украины."],
        ["दिल्ली राजधानी है।", "यह बड़ी है।"],
        ["ما هي العاصمة؟", "باريس."],
        ["Vitamin C is an acid.", "It is white."],
    ],
)
def test_sentences_end_where_people_end_them(wanted):
    joined = "".join if ord(wanted[0][-1]) > 0x3000 or "“好" in wanted[0] else " ".join
    assert split(joined(wanted)) == wanted
    assert split(f"\n {joined(wanted)} \n") == wanted
    assert split("\n\n".join(wanted)) == wanted


def test_items_of_a_list_are_sentences_without_their_marks():
    assert split("Facts:\n- Paris is in France\n- Rome is in Italy.\n") == [
        "Facts:",
        "Paris is in France",
        "Rome is in Italy.",
    ]
    assert split("1. Paris is in France.\n2. Rome is in Italy.") == ["Paris is in France.", "Rome is in Italy."]
    assert split(" ... \n\n — ") == []
    assert split("") == []


@settings(max_examples=300)
@given(st.text(st.sampled_from("aB .!?\n。-1)\"'U"), max_size=40))
def test_nothing_said_is_lost(text):
    spans = sentences(text)
    assert all(0 <= start < stop <= len(text) for start, stop in spans)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    kept = "".join(text[start:stop] for start, stop in spans)
    assert all(kept.count(letter) == text.count(letter) for letter in "aBU")

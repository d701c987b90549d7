"""JSON in untrusted text: what is found, what is refused, and where each value stands."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.tasks.json_text import DEEPEST, LARGEST, at, find, name_of, parse, values

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
SCALAR = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
JSON = st.recursive(
    st.dictionaries(TEXT, SCALAR, max_size=3) | st.lists(SCALAR, max_size=3),
    lambda inner: st.dictionaries(TEXT, inner | SCALAR, max_size=3) | st.lists(inner | SCALAR, max_size=3),
    max_leaves=8,
)
STYLE = st.fixed_dictionaries({
    "indent": st.none() | st.integers(0, 3) | st.just("\t"),
    "ensure_ascii": st.booleans(),
    "separators": st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\r\n:\t")]),
})  # fmt: skip


def leaves(value, path=()):
    """The paths of all scalars and empty containers, by plain recursion."""
    if isinstance(value, dict | list) and value:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    else:
        yield path, value


@settings(max_examples=300)
@given(JSON, STYLE)
def test_every_value_stands_where_the_scanner_says(value, style):
    text = json.dumps(value, **style)
    found = list(values(text))
    assert [one.path for one in found] == [path for path, _ in leaves(value)]
    for one, (path, leaf) in zip(found, leaves(value), strict=True):
        again = json.loads(text[one.start : one.stop])
        assert again == leaf == at(value, path)
        assert type(again) is type(leaf)
    assert all(one.stop <= other.start for one, other in pairwise(found))


@settings(max_examples=150)
@given(JSON.filter(lambda one: isinstance(one, dict)), STYLE, st.sampled_from(["", "Here it is: ", "a } b [ "]))
def test_an_object_is_found_whatever_stands_around_it(value, style, before):
    text = json.dumps(value, **style)
    for around in (f"{before}{text} and {{more}}", f"{before}\n```json\n{text}\n``` {{}}", f" {text}\n"):
        found = find(around)
        assert found is not None
        assert (found.value, around[found.start : found.stop]) == (value, text)


@settings(max_examples=200)
@given(st.text(st.sampled_from('{}[]",:\\0e.-tn \n`a\ud800'), max_size=40))
def test_no_text_makes_it_raise(text):
    found = find(text)
    if found is not None:
        assert parse(text[found.start : found.stop]) == found.value
        assert len(list(values(text[found.start : found.stop]))) >= 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 1}', "twice"),
        ('{"a": [{"b": 1, "b": 2}]}', "twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "float"),
        ('{"a": ' + "9" * 401 + "}", "digits"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[" * 100_00 + "]" * 100_00, "deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deep"),
        ('{"a": "' + "x" * LARGEST + '"}', "characters"),
        ("3", "object"),
        ("{'a': 1}", "property name"),
        ('{"a": 1} {"b": 2}', "Extra"),
        ('{"a": "x\ny"}', "control"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)
    assert find(text) is None or find(text).stop - find(text).start < len(text)


def test_bounds_are_reached():
    parse("[" * DEEPEST + "]" * DEEPEST)
    parse('["' + "x" * (LARGEST - 4) + '"]')
    assert find("{" * 100_000) is None
    assert find("{ " * 5_000 + '{"a": 1}') is None  # so many openings are not tried


def test_names_of_paths():
    assert name_of(("address", "lines", 0, "odd key", "x-y")) == 'address.lines[0]["odd key"].x-y'
    assert name_of((0, "a")) == "[0].a"
    assert name_of(("a.b",)) == '["a.b"]'
    assert name_of(()) == ""

"""Grades of numbers, expressions and words agree with lm-evaluation-harness, math-verify and SQuAD on the same replies.

Where they differ the kind of reply says why, and the builder says who is right.
"""

import random
import sys
import types
from collections import Counter

import pytest

from calibtrain.config_tasks import MathTask, NumberTask, ShortAnswerTask
from calibtrain.records import Message, Record
from calibtrain.tasks.math import Math
from calibtrain.tasks.number import Number
from calibtrain.tasks.short_answer import ShortAnswer, token_f1
from calibtrain.tasks.task import is_right
from tests.numerics.final_replies import math_replies, number_replies

pytestmark = pytest.mark.peer
IGNORED = [",", "\\$", "(?s).*#### ", "\\.$"]
"""Of lm-evaluation-harness's gsm8k.yaml: regexes_to_ignore."""
FILTERS = {
    "strict-match": ("hashes", {"regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}),
    "flexible-extract": ("last_number", {"regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1}),
}
EXPLAINED = {
    "strict-match": {
        "hashes, decimal": "18.0 is the number 18, and other text",
        "hashes, currency": "its pattern knows no $ behind the marks",
        "hashes, no space": "its pattern wants a space behind the marks",
        "hashes twice": "it takes the first, which was taken back",
    },
    "flexible-extract": {
        "hashes, decimal": "18.0 is the number 18, and other text",
        "last number, dots": "three full stops are a number for its pattern",
        "last number, exponent of a unit": "the 2 of m^2 is its last number",
        "last number, digit of a name": "the 2 of H2O is its last number",
    },
}


@pytest.fixture(scope="module")
def lm_eval():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (make peers)")
    if "sacrebleu" not in sys.modules:  # asked for by metrics that are not used here
        try:
            import sacrebleu  # noqa: F401
        except ImportError:
            sys.modules["sacrebleu"] = types.ModuleType("sacrebleu")
    from lm_eval.api import metrics
    from lm_eval.filters import extraction
    from lm_eval.tasks.mlqa import utils  # SQuAD's own F1, for several languages

    return types.SimpleNamespace(
        filter=extraction.RegexFilter, exact_match=metrics.exact_match_hf_evaluate, f1=utils.f1_score
    )


def record(gold):
    return Record((Message("user", "How many?"),), chosen=gold, accepted=(gold,))


@pytest.mark.parametrize("name", FILTERS)
def test_numbers_as_gsm8k_grades_them(lm_eval, name):
    place, options = FILTERS[name]
    task, made = Number(NumberTask(answer_in=(place,))), number_replies(500)
    extracted = lm_eval.filter(**options).apply([[one.reply] for one in made], [{}] * len(made))
    agreed, differ = 0, Counter()
    for one, (text,) in zip(made, extracted, strict=True):
        theirs = lm_eval.exact_match(
            predictions=[text], references=[f"so\n#### {one.gold}"], regexes_to_ignore=IGNORED, ignore_case=True
        )["exact_match"]
        ours = is_right(
            task, one.reply, task.asked(record(f"so\n#### {one.gold}")) if place == "hashes" else record(one.gold)
        )
        agreed += ours == bool(theirs)
        if ours != bool(theirs):
            differ[one.kind] += 1
            assert one.kind in EXPLAINED[name], (one, text)
            assert ours == one.right, one
    print(f"{name}: {agreed} of {len(made)} alike; {dict(differ)}")
    assert differ.keys() == EXPLAINED[name].keys()  # no explanation that explains nothing
    assert agreed + differ.total() == len(made) == 500


def test_the_default_reader_finds_what_a_person_would():
    made = number_replies(500, seed=1)
    task = Number()
    wrong = [one for one in made if is_right(task, one.reply, record(one.gold)) != one.right]
    assert not wrong


def test_expressions_as_math_verify_grades_whole_replies():
    math_verify = pytest.importorskip(
        "math_verify", reason="math-verify is not installed (pip install calibtrain[tasks])"
    )
    task, made = Math(MathTask()), math_replies(500)
    agreed, differ = 0, Counter()
    for one in made:
        theirs = math_verify.verify(math_verify.parse(f"${one.gold}$"), math_verify.parse(one.reply))
        ours = is_right(task, one.reply, task.asked(record(one.gold)))
        agreed += ours == theirs
        if ours != theirs:
            differ[one.kind, one.gold, one.right, ours] += 1
    print(f"math-verify: {agreed} of {len(made)} alike; {dict(differ)}")
    assert not differ


def test_numbers_as_math_verify_grades_whole_replies():
    math_verify = pytest.importorskip(
        "math_verify", reason="math-verify is not installed (pip install calibtrain[tasks])"
    )
    made = [one for one in number_replies(500, seed=2) if one.kind in ("boxed", "answer is", "answer is, currency")]
    task = Number()
    for one in made:
        theirs = math_verify.verify(math_verify.parse(one.gold), math_verify.parse(one.reply))
        assert is_right(task, one.reply, record(one.gold)) == theirs == one.right, one


def test_f1_is_squads(lm_eval):
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "an",
        "quick",
        "Brown",
        "fox",
        "fox",
        "U.S.",
        "york",
        "New",
        "dog's",
        "1,000",
        "don't",
        "it,",
        "end.",
    ]
    bound, positive = ShortAnswer(ShortAnswerTask(match="token_f1", f1=0.5)), 0
    for _ in range(500):
        said, gold = (" ".join(draw.choices(words, k=draw.randrange(1, 8))) for _ in range(2))
        theirs, ours = lm_eval.f1(said, gold, "en"), token_f1(said, gold)
        assert ours == pytest.approx(theirs, abs=1e-12), (said, gold)
        assert bound.right(said, record(gold)) == (theirs >= 0.5)
        positive += ours > 0.0
    assert positive > 250
    # On purpose otherwise: SQuAD makes one word of a hyphenated pair, and 35 of 3.5.
    assert (token_f1("well-known", "well known"), lm_eval.f1("well-known", "well known", "en")) == (1.0, 0)
    assert (token_f1("3.5", "35"), lm_eval.f1("3.5", "35", "en")) == (0.0, 1.0)

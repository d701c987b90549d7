"""Replies as models end them, built from a seed: (kind, reply, gold, whether a reader of the right place finds it right)."""

from __future__ import annotations

import random
from typing import NamedTuple


class Made(NamedTuple):
    """One reply; `right` is what a person would say."""

    kind: str
    reply: str
    gold: str
    right: bool


def working(draw: random.Random) -> str:
    a, b = draw.randrange(2, 60), draw.randrange(2, 60)
    return draw.choice(
        [
            f"First, {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples are left.\nThen half of them are sold.",
            f"Let x = {a}. Then {b}x = {a * b}, since {b} * {a} = {a * b}.",
            f"There are {a} boxes of ${b} each, so ${a * b:,}.00 in all.",
            f"Step 1: {a} - {b} = {a - b}\nStep 2: we go on.",
        ]
    )


NUMBER_KINDS = {
    "hashes": "{w}\n#### {n}",
    "hashes, grouped digits": "{w}\n#### {g}",
    "hashes, full stop": "{w}\n#### {n}.",
    "hashes, decimal": "{w}\n#### {n}.0",
    "hashes, currency": "{w}\n#### ${n}",
    "hashes, no space": "{w}\n####{n}",
    "hashes, unit": "{w}\n#### {n} dollars",
    "hashes twice": "{w}\n#### {o}\nWait, that is wrong.\n#### {n}",
    "hashes, other number behind": "{w}\n#### {n}\nChecked 3 times.",
    "boxed": "{w}\nSo it is $\\boxed{{{n}}}$",
    "answer is": "{w}\nThe answer is {n}.",
    "answer is, currency": "{w}\nThe answer is ${g}.",
    "last number": "{w}\nThey have {n} in the end",
    "last number, dots": "{w}\nThey have {n}... or so...",
    "last number, exponent of a unit": "{w}\nThe field has {n} m^2",
    "last number, digit of a name": "{w}\nThey used {n} litres of H2O",
    "nothing": "I cannot tell how many there are",
}


def number_replies(count: int, seed: int = 0) -> list[Made]:
    """Replies to questions like GSM8K's; every third says a wrong number."""
    draw, made = random.Random(seed), []
    for i in range(count):
        kind = list(NUMBER_KINDS)[i % len(NUMBER_KINDS)]
        gold = draw.choice([draw.randrange(10, 99), draw.randrange(1000, 99999), -draw.randrange(10, 99)])
        if "currency" in kind:
            gold = abs(gold)
        said = gold + draw.choice([1, -1, 10]) if draw.random() < 0.33 else gold
        reply = NUMBER_KINDS[kind].format(w=working(draw), n=said, g=f"{said:,}", o=said + 7)
        made.append(Made(kind, reply, str(gold), said == gold and kind != "nothing"))
    return made


MATH_KINDS = {
    "boxed": "{w}\nHence \\boxed{{{e}}}.",
    "boxed in dollars": "{w}\nHence $\\boxed{{{e}}}$.",
    "boxed in a display": "{w}\nHence\n\\[ \\boxed{{{e}}} \\]",
    "boxed twice": "{w}\nFirst $\\boxed{{{o}}}$, but no: $\\boxed{{{e}}}$.",
    "answer is": "{w}\nThe answer is ${e}$.",
    "final answer is": "{w}\nFinal Answer: The final answer is ${e}$. I hope it is correct.",
    "nothing": "I do not know how to do this",
}
EXPRESSIONS = (
    ("\\frac{1}{2}", ("0.5", "\\dfrac{1}{2}", "\\frac12"), "\\frac{1}{3}"),
    ("x^2+2x+1", ("(x+1)^2", "1+2x+x^2"), "(x-1)^2"),
    ("\\sqrt{8}", ("2\\sqrt{2}", "8^{1/2}"), "\\sqrt{7}"),
    ("(1,2)", ("(1, 2)", "\\left(1,2\\right)"), "(2,1)"),
    ("\\{1,2,3\\}", ("\\{3,2,1\\}",), "\\{1,2\\}"),
    ("[0,1)", ("\\left[0,1\\right)",), "[0,1]"),
    ("1000", ("1{,}000", "10^3", "1,000"), "100"),
    ("\\frac{\\pi}{4}", ("\\pi/4", "0.25\\pi"), "\\frac{\\pi}{2}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ("\\begin{bmatrix}1\\\\2\\end{bmatrix}",), "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),  # noqa: E501
    ("x=5", ("5", "x = 5"), "x=6"),
    ("50\\%", ("50%", "0.5"), "40\\%"),
    ("\\text{East}", ("\\text{East}",), "\\text{West}"),
    ("-3", ("-3.0", "- 3"), "3"),
)  # fmt: skip


def math_replies(count: int, seed: int = 0) -> list[Made]:
    """Replies to questions like MATH's; every third is wrong."""
    draw, made = random.Random(seed), []
    for i in range(count):
        kind = list(MATH_KINDS)[i % len(MATH_KINDS)]
        gold, same, other = EXPRESSIONS[draw.randrange(len(EXPRESSIONS))]
        right = draw.random() >= 0.33
        said = draw.choice((gold, *same)) if right else other
        wrong = other if right else gold
        made.append(
            Made(kind, MATH_KINDS[kind].format(w=working(draw), e=said, o=wrong), gold, right and kind != "nothing")
        )
    return made

"""Confidence that the model is asked for: P(True), a stated number or word, and a second pass over its own reasoning.

It is shown all that it said: the answer with the reasoning before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibtrain.abstention.words import WORDS, Scale
from calibtrain.calibration.scores import sigmoid
from calibtrain.confidence.answered import Answered
from calibtrain.confidence.generation import choice_logprobs, common_prefix, generate, keep_none
from calibtrain.confidence.source import Array, Asker, Cost, SourceScores
from calibtrain.data.queries import NO_YES, choice_ids, query_record
from calibtrain.records import Message, Record
from calibtrain.tasks.matching import normalize

JUDGE = "Is the proposed answer correct?\nChoices:\n({}): {}\n({}): {}"
"""In the order no, yes the query that `correctness_query` trains (Kapoor et al. 2024, arXiv 2406.08391)."""
REASON = "Why? Give your reasoning in one sentence."
WEIGH = "Weigh this before you commit. " + JUDGE
NUMBER = (
    "How likely is it that the proposed answer is correct? Reply with a percentage from 0% to 100% and nothing else."
)
WORD = "How likely is it that the proposed answer is correct? Reply with one of these and nothing else: {}."

ORDERS = (("no", "yes"), ("yes", "no"))
UNREAD = 0.5
"""Value of a reply that cannot be read."""
STATED_TOKENS, CHAIN_TOKENS = 8, 40

_NUMBER = re.compile(r"(?P<number>\d{1,3}(?:\.\d+)?|\.\d+) ?(?P<percent>%?)\.?")


def p_true(
    asker: Asker, records: Sequence[Record], answered: Answered, choices: tuple[str, str] = NO_YES
) -> dict[str, SourceScores]:
    """p(yes) / (p(yes) + p(no)) that the proposed answer is right, averaged over both orders of the options.

    Kadavath et al. 2022, arXiv 2207.05221. `choices` name the options; UserError unless each is a single token. Two
    forward passes.
    """
    dialogues = [
        query_record(record, answer.said, "") for record, answer in zip(records, answered.answers, strict=True)
    ]
    return {"p_true": _judged(asker, dialogues, JUDGE, choices)}


def stated(
    asker: Asker, records: Sequence[Record], answered: Answered, scale: Scale = WORDS
) -> dict[str, SourceScores]:
    """The chance that the model states when asked after its answer: as a percentage, and as a word of `scale`.

    Tian et al. 2023, arXiv 2305.14975. A word means the middle of its band. A reply that is anything else than what was
    asked for counts as failed, with the value UNREAD.
    """
    names = ", ".join(word.name for word in scale)
    found = {}
    for name, query in (("stated_number", NUMBER), ("stated_word", WORD.format(names))):
        asked = [query_record(record, one.said, query) for record, one in zip(records, answered.answers, strict=True)]
        texts, cost = replies(asker, asked, STATED_TOKENS)
        values = [parse_number(text) if name == "stated_number" else parse_word(text, scale) for text in texts]
        failed = np.array([value is None for value in values])
        filled = np.array([UNREAD if value is None else value for value in values], dtype=np.float64)
        found[name] = SourceScores(filled, cost, True, failed)
    return found


def second_pass(
    asker: Asker, records: Sequence[Record], answered: Answered, choices: tuple[str, str] = NO_YES
) -> dict[str, SourceScores]:
    """The model gives its reasoning for the proposed answer, then judges the answer with that reasoning before it.

    As P(True) otherwise. `second_pass_bare` asks the same with the reasoning removed: where it does as well, the
    reasoning adds nothing, or only words of confidence that leak into the judgement.
    """
    asked = [query_record(record, one.said, REASON) for record, one in zip(records, answered.answers, strict=True)]
    chains, cost = replies(asker, asked, CHAIN_TOKENS)
    with_chain = [
        replace(one, prompt=(*one.prompt, Message("assistant", chain), Message("user", "")))
        for one, chain in zip(asked, chains, strict=True)
    ]
    bare = [query_record(record, one.said, "") for record, one in zip(records, answered.answers, strict=True)]
    judged = _judged(asker, with_chain, WEIGH, choices)
    return {
        "second_pass": replace(judged, cost=judged.cost.plus(cost)),
        "second_pass_bare": _judged(asker, bare, WEIGH, choices),
    }


def parse_number(text: str) -> float | None:
    """Probability of "80%", "80" or "0.8"; None for anything else, and for a bare "1", which could mean two things."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    number = float(found["number"])
    if found["percent"]:
        return number / 100.0 if number <= 100.0 else None
    if found["number"] == "1":
        return None
    value = number / 100.0 if number > 1.0 else number
    return value if value <= 1.0 else None


def parse_word(text: str, scale: Scale = WORDS) -> float | None:
    """Middle of the band of a word of `scale`, whatever its case and punctuation; None for anything else."""
    middles = {normalize(word.name): (word.low + word.high) / 2.0 for word in scale}
    return middles.get(normalize(text))


def replies(asker: Asker, records: Sequence[Record], max_new_tokens: int) -> tuple[list[str], Cost]:
    """Greedy replies, of one line each, with what they cost."""
    template = asker.template
    prompts = [template.prompt_ids(record, asker.shots) for record in records]
    generations = generate(
        asker.module,
        prompts,
        **template.ending,
        max_new_tokens=max_new_tokens,
        batch_size=asker.settings.batch_size,
        device=asker.device,
        keep=keep_none,
    )
    lengths = np.array([len(one.tokens) for (one,) in generations], dtype=np.float64)
    tokens = np.array([len(prompt) for prompt in prompts]) + lengths - 1
    texts = [template.decode_answer(one.tokens).split("\n")[0].strip() for (one,) in generations]
    return texts, Cost(lengths, tokens)


def _judged(asker: Asker, dialogues: Sequence[Record], query: str, choices: tuple[str, str]) -> SourceScores:
    """p(yes) among yes and no after `query` in place of each dialogue's last turn, mean of both orders."""
    ids = choice_ids(asker.template, choices)
    texts = [query.format(choices[0], order[0], choices[1], order[1]) for order in ORDERS]
    prompts = [
        [
            asker.template.prompt_ids(replace(one, prompt=(*one.prompt[:-1], Message("user", text))), asker.shots)
            for text in texts
        ]
        for one in dialogues
    ]
    table = choice_logprobs(
        asker.module,
        prompts,
        ids,
        pad_id=asker.template.pad_id,
        batch_size=asker.settings.batch_size,
        device=asker.device,
    ).numpy()
    yes = np.array([order.index("yes") for order in ORDERS])
    k = np.arange(len(ORDERS))
    values: Array = sigmoid(table[:, k, yes] - table[:, k, 1 - yes]).mean(1)
    # Both orders begin alike, up to the options: that part is read once.
    read = [sum(map(len, row)) - (len(row) - 1) * len(common_prefix(row)) for row in prompts]
    cost = Cost(np.full(len(prompts), float(len(ORDERS))), np.array(read, dtype=np.float64))
    return SourceScores(values, cost, True)

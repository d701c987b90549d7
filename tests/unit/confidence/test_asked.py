"""What the model is asked about its answers: both orders count, replies are read strictly, cost is counted."""

import numpy as np
import pytest
import torch

from calibtrain.abstention.words import SCALES
from calibtrain.confidence import asked
from calibtrain.confidence.generation import choice_logprobs
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.config import EvaluationConfig
from calibtrain.data.queries import CORRECTNESS, NO_YES, query_record
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import CITIES, tiny_model, tiny_tokenizer

RECORDS = [Record(prompt=(Message("user", f"Where is {city}?"),), accepted=(country,)) for city, country in CITIES]
CHOICES = ("India", "the")


@pytest.fixture(scope="module")
def asker():
    return Asker(
        LossModel(Policy(tiny_model(initializer_range=0.3, max_position_embeddings=2048))).eval(),
        Template("plain", tiny_tokenizer()),
        EvaluationConfig(batch_size=4, max_new_tokens=4),
        shots=(Record(prompt=(Message("user", "Where is Bern?"),), chosen="Switzerland"),),
    )


@pytest.fixture(scope="module")
def answered(asker):
    return answer_questions(asker.module, asker.template, RECORDS, asker.settings, shots=asker.shots)


@torch.no_grad()
def probability_of_yes(asker, record, text, order):
    """Of one question on its own, from the model's own logits."""
    query = asked.JUDGE.format(CHOICES[0], order[0], CHOICES[1], order[1])
    ids = asker.template.prompt_ids(query_record(record, text, query), asker.shots)
    logits = asker.module.policy.causal_model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    tokens = [asker.template.completion_ids(choice)[0] for choice in CHOICES]
    return logits[tokens].softmax(-1)[order.index("yes")].item(), len(ids)


def test_p_true_is_the_mean_over_both_orders_of_yes_among_yes_and_no(asker, answered):
    found = asked.p_true(asker, RECORDS, answered, CHOICES)["p_true"]
    assert found.probability
    for i, (record, answer) in enumerate(zip(RECORDS, answered.answers, strict=True)):
        parts = [probability_of_yes(asker, record, answer.text, order) for order in asked.ORDERS]
        assert parts[0][0] != pytest.approx(parts[1][0], abs=1e-3)  # the order matters to this model
        assert found.values[i] == pytest.approx((parts[0][0] + parts[1][0]) / 2, abs=1e-4)
        assert parts[0][1] < found.cost.tokens[i] < parts[0][1] + parts[1][1]  # the dialogue is read once
    assert found.cost.forward_passes.tolist() == [2.0] * len(RECORDS)


def test_the_first_order_is_the_query_that_losses_train():
    assert asked.JUDGE.format(NO_YES[0], "no", NO_YES[1], "yes") == CORRECTNESS.format(*NO_YES)


def test_the_second_pass_reads_the_chain_and_the_bare_one_does_not(asker, answered):
    found = asked.second_pass(asker, RECORDS, answered, CHOICES)
    chain, bare = found["second_pass"], found["second_pass_bare"]
    assert bare.cost.forward_passes.tolist() == [2.0] * len(RECORDS)
    assert (chain.cost.forward_passes > 2).all()
    assert (chain.cost.tokens > bare.cost.tokens).all()
    assert np.abs(chain.values - bare.values).max() > 1e-3


def test_a_random_model_states_nothing_that_can_be_read(asker, answered):
    for one in asked.stated(asker, RECORDS, answered).values():
        assert one.num_failed == len(RECORDS)
        assert one.values.tolist() == [0.5] * len(RECORDS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80%", 0.8),
        ("80", 0.8),
        (" 0.8 ", 0.8),
        ("100%", 1.0),
        ("0", 0.0),
        ("1%", 0.01),
        ("1.0", 1.0),
        ("97.5 %.", 0.975),
    ]
    + [
        (text, None)
        for text in ("1", "101%", "101", "about 80%", "80% sure", "-5%", "", "%", "8 0%", "1e2", "0.8 of 1")
    ],
)
def test_numbers_are_read_strictly(text, value):
    assert asked.parse_number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("name", SCALES)
def test_every_word_of_a_scale_is_read_and_lies_in_its_band(name):
    for word in SCALES[name]:
        value = asked.parse_word(f" {word.name.title()}. ", SCALES[name])
        assert word.low < value < word.high
    assert asked.parse_word("quite likely, I think", SCALES[name]) is None


def test_choice_logprobs_do_not_depend_on_batches_or_what_is_read_once(asker):
    variants = [
        [[5, 6, 7, 8, 9], [5, 6, 7, 8, 4, 4]],
        [[5, 6, 7], [5, 6, 8]],
        [[5, 6, 7, 30, 31, 32], [5, 6, 7, 30, 9]],
        [[5, 6, 99], [5, 7]],  # share nothing beyond what all share
    ]
    alone = [
        [choice_logprobs(asker.module, [[prompt]], [7, 50, 3], pad_id=2, batch_size=1)[0, 0] for prompt in row]
        for row in variants
    ]
    expected = torch.stack([torch.stack(row) for row in alone])
    for size, share in ((1, False), (3, True), (4, True), (8, True), (2, False)):
        found = choice_logprobs(
            asker.module, variants[:3] if share else variants, [7, 50, 3], pad_id=2, batch_size=size, share_prefix=share
        )
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-4, rtol=1e-4)
    found = choice_logprobs(asker.module, variants, [7, 50, 3], pad_id=2, batch_size=8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_scores_outside_the_unit_interval_are_refused():
    with pytest.raises(UserError, match=r"not in \[0, 1\]"):
        SourceScores(np.array([0.5, np.nan]), Cost.none(2), True)
    with pytest.raises(UserError, match="2 scores, 1 costs"):
        SourceScores(np.array([0.5, 0.5]), Cost.none(1), True)

"""Generation is the same for every batch size and layout, and its log-probs are those of a teacher-forced pass."""

import math

import pytest
import torch

from calibtrain.confidence.answered import logprob_table
from calibtrain.confidence.generation import common_prefix, generate
from calibtrain.confidence.likelihood import answer_questions, sample_answers
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 7, 30, 31, 32, 33, 40], [5, 6, 99], [5, 6, 7, 8, 9, 10]]
STOPS = frozenset(range(0, 400, 9))


@pytest.fixture(scope="module", params=["one scale", "scaled"])
def model(request):
    module = LossModel(Policy(tiny_model(initializer_range=0.3))).eval()
    module.policy.scale = 1.0 if request.param == "one scale" else 0.6
    return module


def complete(model, prompts=PROMPTS, **changes):
    settings = {"stop_ids": STOPS, "pad_id": 2, "max_new_tokens": 6, "batch_size": 8, **changes}
    return generate(model, prompts, **settings)


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.tokens, a.finished) == (b.tokens, b.finished)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_same_for_every_batch_size_and_prefix_sharing(model, batch_size, share_prefix):
    expected = complete(model, share_prefix=False)
    assert len({one.tokens for (one,) in expected}) > 1
    assert_same(complete(model, batch_size=batch_size, share_prefix=share_prefix), expected)


def test_left_padding_equals_a_prompt_on_its_own(model):
    assert_same(complete(model), [complete(model, [prompt])[0] for prompt in PROMPTS])


@torch.no_grad()
def test_logprobs_are_those_of_a_teacher_forced_pass(model):
    for prompt, (one,) in zip(PROMPTS, complete(model), strict=True):
        ids = torch.tensor([[*prompt, *one.tokens]])
        hidden = model.policy.backbone(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(one.hidden, hidden, atol=1e-4, rtol=1e-4)
        table = model.policy.logits(model.policy.scaled(hidden)).log_softmax(-1)
        expected = table.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert list(one.tokens) == table.argmax(-1).tolist()
        assert one.finished == (one.tokens[-1] in STOPS)
        assert not any(token in STOPS for token in one.tokens[:-1])
        assert len(one.tokens) <= 6


def test_sampling_is_seeded_and_follows_the_model(model):
    draw = complete(model, samples=3, seed=4)
    assert all(len(row) == 3 for row in draw)
    assert_same(draw, complete(model, samples=3, seed=4))
    other = complete(model, samples=3, seed=5)
    assert [one.tokens for row in draw for one in row] != [one.tokens for row in other for one in row]


def test_samples_do_not_depend_on_whether_the_prefix_is_shared(model):
    assert_same(complete(model, samples=3, seed=4), complete(model, samples=3, seed=4, share_prefix=False))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_what_is_drawn_depends_on_the_stream_alone(model, batch_size):
    """Not on what else is asked beside it: two halves, as of two ranks, in another order, are the whole."""
    names = ["a", "b", "c", "d", "e"]
    whole = complete(model, samples=4, seed=3, streams=names)
    assert len({one.tokens for group in whole for one in group}) > 5
    half = {}
    for part in ([4, 1], [3, 0, 2]):
        prompts = [PROMPTS[i] for i in part]
        found = complete(model, prompts, samples=4, seed=3, streams=[names[i] for i in part], batch_size=batch_size)
        half |= dict(zip(part, found, strict=True))
    assert_same([half[i] for i in range(5)], whole)
    same = complete(model, [PROMPTS[0]] * 2, samples=4, seed=3, streams=["a", "b"])
    assert same[0] != same[1]  # the same question twice


def test_sampled_logprobs_are_those_of_a_teacher_forced_pass(model):
    for prompt, row in zip(PROMPTS, complete(model, samples=3, seed=4), strict=True):
        for one in row:
            ids = torch.tensor([[*prompt, *one.tokens]])
            hidden = model.policy.backbone(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
            table = model.policy.logits(model.policy.scaled(hidden)).log_softmax(-1)
            expected = table.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
            assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_sampled_shares_are_the_probabilities():
    model = LossModel(Policy(tiny_model(initializer_range=0.3))).eval()
    drawn = complete(model, [[5, 6, 7]], samples=4000, max_new_tokens=1, seed=1)[0]
    expected = model.policy.logits(drawn[0].hidden).detach().softmax(-1)[0]
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in drawn]), minlength=400) / 4000
    top = int(expected.argmax())
    p = float(expected[top])
    assert abs(float(counts[top]) - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix([]) == []
    assert common_prefix([[1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1]
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 5]]) == [1, 2]
    assert common_prefix([[7], [8]]) == []


QUESTIONS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(str(i),)) for i in range(7)]
SETTINGS = EvaluationConfig(batch_size=3, max_new_tokens=5)


def test_features_scored_again_give_the_answers_logprobs(model):
    answered = answer_questions(model, Template("plain", tiny_tokenizer()), QUESTIONS, SETTINGS)
    assert [answer.question_id for answer in answered.answers] == [one.id for one in QUESTIONS]
    expected = [answer.logprob for answer in answered.answers]
    table = logprob_table(model, answered.features, (0.5, 1.0, 2.0))
    assert table[:, 1].tolist() == pytest.approx(expected, abs=1e-4)
    assert (table <= 0).all()
    assert [answer.correct for answer in answered.answers] == [bool(one) for one in answered.features.correct]


def test_bfloat16_features_agree_within_its_precision():
    model = LossModel(Policy(tiny_model(initializer_range=0.3).bfloat16())).eval()
    answered = answer_questions(model, Template("plain", tiny_tokenizer()), QUESTIONS, SETTINGS)
    assert answered.features.hidden.dtype == torch.bfloat16
    again = logprob_table(model, answered.features, (1.0,))[:, 0].tolist()
    assert again == pytest.approx([answer.logprob for answer in answered.answers], abs=0.1)


def test_selected_features_are_those_of_the_answers(model):
    features = answer_questions(model, Template("plain", tiny_tokenizer()), QUESTIONS, SETTINGS).features
    table = logprob_table(model, features, (1.0, 3.0))
    for chosen in ([4, 0, 6], [2], list(range(7)), []):
        some = features.select(torch.tensor(chosen, dtype=torch.int64))
        assert torch.equal(some.correct, features.correct[chosen])
        torch.testing.assert_close(logprob_table(model, some, (1.0, 3.0)), table[chosen], atol=1e-5, rtol=1e-5)


def test_no_questions_give_no_answers(model):
    answered = answer_questions(model, Template("plain", tiny_tokenizer()), [], SETTINGS)
    assert answered.answers == []
    assert answered.features.correct.shape == (0,)


def test_ungradable_questions_have_no_grade(model):
    free = [Record(prompt=(Message("user", "Why?"),))]
    answered = answer_questions(model, Template("plain", tiny_tokenizer()), free, SETTINGS)
    assert answered.answers[0].correct is None
    assert answered.features.correct.isnan().all()


def test_sampled_answers_are_texts(model):
    texts = sample_answers(model, Template("plain", tiny_tokenizer()), QUESTIONS, SETTINGS, samples=2, seed=0)
    assert [len(row) for row in texts] == [2] * 7
    assert all(isinstance(text, str) and "\n" not in text for row in texts for text in row)

"""Whatever reads an answer in a chain reads its span: losses, features, sources; what asks about it shows all of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from calibtrain.confidence import asked
from calibtrain.confidence.features import Fingerprint, features_of
from calibtrain.confidence.generation import Generation, generate, keep_none
from calibtrain.confidence.likelihood import Answered, answer_questions, graded_answers
from calibtrain.confidence.sampling import sampled
from calibtrain.confidence.source import Asker
from calibtrain.confidence.sources import score
from calibtrain.config import EvaluationConfig
from calibtrain.config_tasks import NumberTask
from calibtrain.data.collate import collate
from calibtrain.data.encode import encode_answer
from calibtrain.data.queries import query_record
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses import AnswerScoreLoss, CalibrationAwareLoss, MMCELoss, SoftBinnedECELoss
from calibtrain.losses.terms import QUERY
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.ops import TokenStats
from calibtrain.records import Message, Record
from calibtrain.tasks.number import Number
from tests.tiny import tiny_model, tiny_tokenizer

RECORDS = [Record((Message("user", f"What is {i} and 1?"),), accepted=(str(i + 1),)) for i in range(3)]
CHAINS = ["0 and 1\nis 1\n#### 1 in all", "\n\n1 and 1 is 3\n#### 3", "nobody can tell"]
GRADES = (True, False, False)


@pytest.fixture(scope="module", params=["plain", "chat"])
def template(request):
    return Template(request.param, tiny_tokenizer(), task=Number(NumberTask(answer_in=("hashes",))))


@pytest.fixture(scope="module")
def model():
    return LossModel(Policy(tiny_model(initializer_range=0.3, max_position_embeddings=2048))).eval()


def encoded(template, **options):
    rows = zip(RECORDS, CHAINS, GRADES, strict=True)
    return [encode_answer(one, text, grade, template, 200, i, **options) for i, (one, text, grade) in enumerate(rows)]


def test_an_own_answer_knows_its_span(template):
    found = encoded(template)
    texts = [
        template.tokenizer.decode(one.ids[one.completion_start :][slice(*(one.answer_span or (0, None)))])
        for one in found
    ]
    assert [text.strip() for text in texts[:2]] == ["1", f"3{template.tokenizer.decode([template.end_id])}"]
    assert found[2].answer_span is None  # nothing found: all of it is wrong
    assert found[1].answer_span[1] == found[1].completion_length  # "3" is not credited with the chance of "30"
    assert all(one.answer_span is None for one in encoded(template, role=QUERY))


def test_what_ends_an_answer_is_read_with_it():
    """12 has no part of the chance of 125: the brace behind it is read too, and nothing more."""
    template = Template("chat", tiny_tokenizer(), task=Number(NumberTask(answer_in=("boxed",))))
    for said, read in ((r"so \boxed{12} it is", "12}"), (r"so \boxed{12}", "12}"), ("so \\boxed{1", None)):
        ids = [*template.tokenizer(said, add_special_tokens=False)["input_ids"], template.end_id]
        reply = read_reply(template, ids, RECORDS[0])
        assert template.tokenizer.decode(ids[slice(*reply.span)]).removeprefix("{") == (read or said + "<|im_end|>")


@pytest.mark.parametrize("packing", [None, 400])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_batch_marks_the_answers_tokens(template, packing, prefix):
    rows = encoded(template)
    batch = collate(rows, 0, packing_tokens=packing, shared_prefix=prefix)
    expected = [
        start <= place < stop
        for one in rows
        for start, stop in [one.answer_span or (0, one.completion_length)]
        for place in range(one.completion_length)
    ]
    assert batch.is_answer.tolist() == expected
    assert collate([replace(one, answer_span=None) for one in rows], 0).is_answer is None


def penalties():
    aware = CalibrationAwareLoss()
    aware.fit(torch.tensor([0.1, 0.6, 0.9]), torch.tensor([0.0, 1.0, 1.0]))
    banked = [MMCELoss(), SoftBinnedECELoss(temperature=0.1)]
    for one in banked:
        one.bank.items = torch.tensor([[0.2, 0.0, 90.0], [0.7, 1.0, 91.0], [0.4, 1.0, 92.0]], dtype=torch.float64)
    return [AnswerScoreLoss(), AnswerScoreLoss(score="brier"), aware, *banked]


@pytest.mark.parametrize("number", range(5))
def test_the_penalties_move_the_likelihood_of_the_span_alone(template, number):
    penalty = penalties()[number].eval()
    batch = collate(encoded(template), 0)
    leaf = torch.linspace(-0.4, -0.1, len(batch.targets), dtype=torch.float64).requires_grad_()
    zeros = torch.zeros_like(leaf)
    (term,) = penalty(TokenStats(leaf, zeros, zeros, zeros, zeros > 0), batch).values()
    term.total.backward()
    assert term.count == 3
    assert ((leaf.grad != 0) == batch.is_answer).all()
    # Every token of a span has the gradient of its sum.
    spans = [leaf.grad[batch.is_answer & (batch.sequence_ids == i)] for i in range(3)]
    assert all((one == one[0]).all() for one in spans)
    if number == 1:
        q = [math.exp(leaf.detach()[batch.is_answer & (batch.sequence_ids == i)].sum()) for i in range(3)]
        assert term.total.item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(q, GRADES, strict=True)))
        for one, a, b in zip(spans, q, GRADES, strict=True):
            assert one[0].item() == pytest.approx(2 * (a - b) * a)


def said(template, text):
    ids = template.completion_ids(text)
    return Generation(tuple(ids), tuple(-0.1 - 0.01 * i for i in range(len(ids))), torch.zeros(len(ids), 2), True)


def test_sources_of_the_span_and_of_the_chain(template, model):
    asker = Asker(model, template, EvaluationConfig(batch_size=4, max_new_tokens=4))
    generations = [said(template, text) for text in CHAINS]
    answers = graded_answers(RECORDS, generations, template, asker.settings).answers
    assert [one.correct for one in answers] == list(GRADES)
    assert [one.found for one in answers] == [True, True, False]
    names = ("likelihood_chain", "likelihood_chain_mean")
    found = score(asker, RECORDS, Answered(answers, None), names)
    for i, one in enumerate(generations):
        total, count = math.fsum(one.logprobs), len(one.tokens)
        assert found["likelihood_chain"].values[i] == pytest.approx(math.exp(total))
        assert found["likelihood_chain_mean"].values[i] == pytest.approx(math.exp(total / count))
    assert answers[0].confidence > found["likelihood_chain"].values[0]
    assert answers[2].confidence == pytest.approx(found["likelihood_chain"].values[2])  # where nothing was found
    assert not any(one.probability for one in found.values())
    assert found["likelihood_chain"].cost.tokens.sum() == 0


@torch.no_grad()
def test_features_are_read_at_the_span(template, model):
    found = features_of(model, template, RECORDS, CHAINS, layers=(1,), fingerprint=Fingerprint("a", "b"))
    for i, one in enumerate(encoded(template)):
        states = model.policy.causal_model(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states[
            1
        ][0]
        start, stop = one.answer_span or (0, one.completion_length)
        stop = min(stop, one.completion_length - 1)  # without the end token
        span = states[one.completion_start + start : one.completion_start + stop]
        for position, expected in (
            ("question_last", states[one.completion_start - 1]),
            ("answer_last", span[-1]),
            ("answer_mean", span.mean(0)),
        ):
            np.testing.assert_allclose(found.at(1, position)[i], expected, atol=2e-5, rtol=1e-4)


def test_the_model_is_shown_its_reasoning(template, model, monkeypatch):
    asker = Asker(model, template, EvaluationConfig(batch_size=4, max_new_tokens=4))
    answered = graded_answers(RECORDS[:1], [said(template, CHAINS[0])], template, asker.settings)
    shown = []
    monkeypatch.setattr(
        asked, "query_record", lambda record, text, query: shown.append(text) or query_record(record, text, query)
    )
    choices = {"choices": ("India", "the") if template.kind == "plain" else ("a", "b")}
    for family in (asked.p_true, asked.stated, asked.second_pass):
        family(asker, RECORDS[:1], answered, **({} if family is asked.stated else choices))
    assert set(shown) == {CHAINS[0]}


def test_samples_that_end_in_one_number_mean_the_same(template, monkeypatch):
    texts = ["1 it is\n#### 1.0", "so\n#### $1", "\n#### 2", "#### 1e0"]
    drawn = [[said(template, text) for text in texts]]
    monkeypatch.setattr("calibtrain.confidence.sampling.generate", lambda *a, **k: drawn)
    asker = Asker(None, template, EvaluationConfig(batch_size=4, max_new_tokens=4))
    answered = graded_answers(RECORDS[:1], [said(template, CHAINS[0])], template, asker.settings)
    found = sampled(asker, RECORDS[:1], answered, samples=4)
    assert found["self_consistency"].values[0] == pytest.approx((3 + 1) / (4 + 2))
    assert found["semantic_entropy_counts"].values[0] == pytest.approx(
        math.exp(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )


def test_replies_without_an_answer_do_not_agree(template, monkeypatch):
    drawn = [[said(template, "nobody can tell")] * 3 + [said(template, "#### 1")]] * 2
    monkeypatch.setattr("calibtrain.confidence.sampling.generate", lambda *a, **k: drawn)
    asker = Asker(None, template, EvaluationConfig(batch_size=4, max_new_tokens=4))
    answered = graded_answers(
        RECORDS[:2], [said(template, CHAINS[2]), said(template, CHAINS[0])], template, asker.settings
    )
    found = sampled(asker, RECORDS[:2], answered, samples=4)
    assert found["self_consistency"].values.tolist() == pytest.approx([1 / 6, 2 / 6])
    assert found["semantic_entropy_counts"].values.tolist() == pytest.approx([1 / 4, 1 / 4])


def test_hidden_states_of_the_span_are_those_kept(model):
    """A stand-in reads "the answer" in a fixed place of what a random model says; its states are those of a whole pass."""

    class Third(Number):
        def read(self, reply, record):
            return replace(super().read("#### 1", record), text=reply[2:4], start=2, stop=4)

    template = Template("chat", tiny_tokenizer(), task=Third())
    settings = EvaluationConfig(batch_size=2, max_new_tokens=80)
    found = answer_questions(model, template, RECORDS, settings)
    prompts = [template.prompt_ids(one) for one in RECORDS]
    rest = {
        "stop_ids": template.stop_ids,
        "goes_on": template.goes_on,
        "pad_id": 2,
        "max_new_tokens": 80,
        "batch_size": 2,
    }
    whole = [one for (one,) in generate(model, prompts, **rest)]
    again = graded_answers(RECORDS, whole, template, settings)
    torch.testing.assert_close(found.features.hidden, again.features.hidden)
    assert torch.equal(found.features.targets, again.features.targets)
    assert found.answers == again.answers
    assert len(found.features.hidden) < sum(len(one.tokens) for one in whole)
    for (one,) in generate(model, prompts, keep=keep_none, **rest):
        assert one.hidden.shape == (0, whole[0].hidden.shape[1])


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("task", [None, Number()])
def test_stops_of_the_config_end_a_reply(kind, task):
    template = Template(kind, tiny_tokenizer(), task=task, stop=("END", "。"))
    reply = template._encode("one END two")
    assert template.decode_answer(reply) == "one"
    for stop in ("END", "。"):
        ids = template._encode(f"about {stop}")
        assert ids[-1] in template.stop_ids
        assert not template.goes_on(ids)
        assert template.goes_on(ids[:-1])
    assert template.goes_on(template._encode("wEND".replace("E", "e")))
    assert template.hash != Template(kind, tiny_tokenizer(), task=task).hash


@pytest.mark.parametrize("stop", ["", "Q: ", " "])
def test_a_stop_that_cannot_be_found_is_refused(stop):
    with pytest.raises(UserError, match=r"evaluation\.stop"):
        Template("plain", tiny_tokenizer(), stop=(stop,))


def test_refusals_are_told_by_all_that_was_said(template):
    from calibtrain.confidence.forced import is_refusal

    (answer,) = graded_answers(RECORDS[:1], [said(template, "I do not know.")], template, EvaluationConfig()).answers
    assert (answer.text, answer.found) == ("", False)
    assert is_refusal(answer.said)

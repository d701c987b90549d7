"""The confidence head: it starts as the likelihood, its gradients are right, it reads training batches as answering does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from calibtrain.calibration.scores import sigmoid
from calibtrain.confidence import head as confidence_head
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import (
    LEAST_FOR_STATES,
    FittedHead,
    HeadInputs,
    _cross_validated,
    _main_directions,
    _offset,
    _solve,
    _states,
    fit_head,
    trained_head,
)
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.config import EvaluationConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded, encode_answer
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.answer_score import AnswerScoreLoss
from calibtrain.losses.terms import ANSWER, CHOSEN
from calibtrain.losses.token_terms import answer_logprob, answer_tokens, own_answers
from calibtrain.models.confidence_head import POSITIONS, QUIET, READINGS, ConfidenceHead, answer_states, readings_of
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.ops import TokenStats
from calibtrain.records import Message, Record
from tests.tiny import tiny_model, tiny_tokenizer

OURS = Fingerprint("weights", "template")
LAYERS = (0, 1, 2)
QUESTIONS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=(f"{i}",), origin=f"r{i}") for i in range(12)]


def head(score="log", dtype=torch.float32, filled=False, **options):
    made = ConfidenceHead(LAYERS, 32, score=score, **options).to(dtype)
    if filled:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for one in made.parameters():
                one += torch.randn(one.shape, generator=draw).to(dtype)
    return made


def batch_of(shared=False, packing=None):
    """Answers with a grade, without one, with reasoning before them, and a completion to learn."""
    rows = [
        Encoded((5, 6, 7, 8, 9, 10), 3, ANSWER, 0, correct=1.0),
        Encoded((5, 6, 7, 11, 12), 3, ANSWER, 0, correct=0.0, answer_span=(1, 2)),
        Encoded((5, 6, 13), 2, ANSWER, 1, correct=float("nan")),
        Encoded((9, 9, 8, 7), 2, CHOSEN, 2),
        Encoded((5, 6, 21, 22, 23, 24, 25), 2, ANSWER, 1, correct=1.0, answer_span=(2, 4)),
    ]
    return collate(rows, 0, packing_tokens=packing, shared_prefix=shared)


def model_with(made):
    model = LossModel(Policy(tiny_model())).eval()
    model.confidence_head = made
    return model


def trained(model, batch):
    divisors = {name: count.float() for name, count in model.counts(batch).items()}
    return model(TrainStep(batch, divisors))


@pytest.mark.parametrize("score", ["log", "brier"])
def test_at_the_start_it_is_the_likelihood(score):
    made, batch = head(score), batch_of()
    loss, output = trained(model_with(made), batch)
    stats = output.stats
    expected = AnswerScoreLoss(score=score)(stats, batch)["answer_score"]
    assert output.terms["confidence_head"].total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert output.terms["confidence_head"].count == expected.count == 3
    assert loss.item() == pytest.approx(expected.total.item() / 3, rel=1e-5)
    logprob = -torch.logspace(-12, 2, 60, dtype=torch.float64)
    blank = torch.zeros(60, len(READINGS)).double(), torch.zeros(60, 3, len(POSITIONS), 32).double()
    probability = head(dtype=torch.float64).logit(logprob, *blank).sigmoid()
    torch.testing.assert_close(probability, logprob.exp(), rtol=1e-12, atol=1e-15)


def test_half_precision_is_read_in_float32():
    made = head(dtype=torch.bfloat16, filled=True)
    states = torch.randn(4, 3, len(POSITIONS), 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logprob, readings = torch.tensor([-0.001, -0.1, -2.0, -30.0]), torch.zeros(4, len(READINGS))
    wide = head()
    wide.load_state_dict({name: value.float() for name, value in made.state_dict().items()})
    found = made.logit(logprob, readings, states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide.logit(logprob, readings, states.float()))


@pytest.mark.parametrize("score", ["log", "brier"])
def test_gradients(score):
    """Of the states and the tokens' log-probs exactly; the head's own weights get the share QUIET, in the same direction."""
    made, batch = head(score, torch.float64, filled=True, trains_backbone=True), batch_of()
    n, draw = len(batch.targets), torch.Generator().manual_seed(1)
    logprob = -torch.rand(n, generator=draw).double() - 0.1
    entropy = torch.rand(n, generator=draw).double()
    states = torch.randn(n, 3, 32, generator=draw).double()

    def loss(logprob, entropy, states):
        stats = TokenStats(logprob, entropy, entropy, entropy, torch.zeros(n, dtype=torch.bool))
        return made.terms(made(stats, states, batch), batch)["confidence_head"].total

    leaves = [one.requires_grad_() for one in (logprob, entropy, states)]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    found = torch.autograd.grad(loss(*leaves), list(made.parameters()))
    for parameter, gradient in zip(made.parameters(), found, strict=True):
        for place in [(0,) * parameter.ndim, (-1,) * parameter.ndim]:
            with torch.no_grad():
                parameter[place] += 1e-6
                more = loss(*leaves)
                parameter[place] -= 2e-6
                less = loss(*leaves)
                parameter[place] += 1e-6
            assert gradient[place].item() / QUIET == pytest.approx((more - less).item() / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("through", [False, True])
def test_the_model_is_moved_by_it_only_where_that_is_asked_for(through):
    model = model_with(head(filled=True, trains_backbone=through))
    loss, _ = trained(model, batch_of())
    loss.backward()
    moved = [one.grad is not None and bool(one.grad.abs().max() > 0) for one in model.policy.parameters()]
    assert any(moved) == through
    assert all(one.grad.abs().max() > 0 for one in model.confidence_head.parameters())


@pytest.mark.parametrize("layout", [{"shared": True}, {"packing": 64}, {"shared": True, "packing": 64}])
def test_however_rows_are_laid_out(layout):
    model = model_with(head(filled=True))
    loss, expected = trained(model, batch_of())
    other, found = trained(model, batch_of(**layout))
    assert found.terms["confidence_head"].total.item() == pytest.approx(
        expected.terms["confidence_head"].total.item(), rel=1e-5
    )
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)


def test_what_it_reads_of_a_batch():
    batch = batch_of()
    n, draw = len(batch.targets), torch.Generator().manual_seed(1)
    logprob, entropy, states = (
        -torch.rand(n, generator=draw),
        torch.rand(n, generator=draw),
        torch.randn(n, 3, 32, generator=draw),
    )
    from calibtrain.losses.token_terms import answer_tokens

    read = answer_tokens(batch)
    readings = readings_of(logprob, entropy, read, batch.sequence_ids, 5)
    picked = answer_states(states, batch)
    for sequence in range(5):
        mine = (batch.sequence_ids == sequence).nonzero()[:, 0]
        own = mine[read[mine]]
        expected = [logprob[own].mean(), logprob[own].min(), logprob[own[0]], entropy[own].mean(), entropy[own].max()]
        torch.testing.assert_close(readings[sequence, :5], torch.stack(expected))
        assert readings[sequence, 5].item() == pytest.approx(np.log(len(own)))
        torch.testing.assert_close(picked[sequence, :, 0], states[mine[0]])
        torch.testing.assert_close(picked[sequence, :, 1], states[own].mean(0))
        torch.testing.assert_close(picked[sequence, :, 2], states[own[-1]])
    nothing = torch.zeros(0)
    assert readings_of(nothing, nothing, nothing.bool(), nothing.long(), 2).tolist() == [[0.0] * len(READINGS)] * 2


def test_an_empty_batch_still_has_a_gradient():
    model = model_with(head())
    loss, output = trained(model, collate([Encoded((9, 9, 8, 7), 2, CHOSEN, 2)], 0))
    assert output.terms["confidence_head"].count == 0
    (loss + 0.0).backward()
    assert all(one.grad is not None for one in model.confidence_head.parameters())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_answering_gives_what_training_reads(scale):
    """The same answers, generated with their states and passed once more as a training batch: the same log-odds."""
    template = Template("plain", tiny_tokenizer())
    model = LossModel(Policy(tiny_model(len(template.tokenizer)))).eval()
    model.confidence_head = made = head(filled=True)
    settings = EvaluationConfig(batch_size=5, max_new_tokens=6)
    answered = answer_questions(model, template, QUESTIONS, settings, layers=LAYERS)
    inputs = HeadInputs.of(answered)
    plain = answer_questions(model, template, QUESTIONS, settings)
    assert [one.text for one in plain.answers] == [one.text for one in answered.answers]
    found = trained_head(made.state_dict(), LAYERS, OURS).logit(inputs)
    kept, sequences = [], []
    for place, (record, one) in enumerate(zip(QUESTIONS, answered.answers, strict=True)):
        encoded = encode_answer(record, one.said, True, template, 200, place)
        # a reply that was cut, or that its tokenizer would write otherwise, is another sequence
        if one.finished and len(encoded.ids) - encoded.prompt_length == len(one.token_logprobs):
            kept.append(place)
            sequences.append(encoded)
    batch = collate(sequences, template.pad_id) if kept else None
    if batch is None:  # a random model may never stop: then every reply is cut, and the batch is made of its tokens
        kept, sequences = list(range(len(QUESTIONS))), []
        tokens = answered.features.targets.split(torch.bincount(answered.features.sequence_ids).tolist())
        for place, (record, own) in enumerate(zip(QUESTIONS, tokens, strict=True)):
            prompt = template.prompt_ids(record)
            sequences.append(Encoded((*prompt, *own.tolist()), len(prompt), ANSWER, place, correct=1.0))
        batch = collate(sequences, template.pad_id)
    hidden, states = model.policy.states_at_targets(batch, LAYERS)
    stats = model.policy.token_stats(hidden, batch.targets)
    logprob = answer_logprob(stats, batch, own_answers(batch, graded=True))
    read = readings_of(stats.logprob, stats.entropy, answer_tokens(batch), batch.sequence_ids, len(kept))
    expected = made.logit(logprob, read, answer_states(states, batch)).detach().numpy()
    np.testing.assert_allclose(found[kept], expected, atol=2e-3, rtol=1e-3)
    model.policy.scale = scale  # of the states that it reads the calibrated scale changes nothing
    again = answer_questions(model, template, QUESTIONS, settings, layers=LAYERS)
    torch.testing.assert_close(again.states, answered.states)


# Solving


def graded(n=400, told=1.0, seed=0):
    """Answers whose grades the likelihood tells a little, and one direction of a state, `told` times as much."""
    rng = np.random.default_rng(seed)
    states, logprob = rng.normal(size=(n, 2, len(POSITIONS), 16)), -rng.exponential(size=n)
    known = np.log(np.exp(logprob) / -np.expm1(logprob))
    correct = rng.random(n) < sigmoid(known + told * 3 * states[:, 1, 2, 0])
    return HeadInputs(logprob, rng.normal(size=(n, len(READINGS))), states), correct


def log_loss(logit, correct):
    return float((np.logaddexp(0.0, logit) - correct * logit).mean())


def test_it_is_found_where_it_is_and_the_likelihood_stays_where_nothing_is():
    train, test = graded(), graded(2000, seed=1)
    solved, held_out = fit_head(*train, (1, 2), OURS)
    offset = np.log(np.exp(test[0].logprob) / -np.expm1(test[0].logprob))
    assert log_loss(solved.logit(test[0]), test[1]) < log_loss(offset, test[1]) - 0.1
    assert held_out.shape == (400,)
    others = graded(2000, told=0.0, seed=1)
    offset = np.log(np.exp(others[0].logprob) / -np.expm1(others[0].logprob))
    strengths = []
    for seed in range(2, 6):  # where the likelihood is all there is
        solved, _ = fit_head(*graded(300, told=0.0, seed=seed), (1, 2), OURS)
        strengths.append(solved.strength)
        assert log_loss(solved.logit(others[0]), others[1]) < log_loss(offset, others[1]) + 0.01
        if solved.strength is None:
            assert np.abs(solved.weights["states"]).max() == 0.0
            order = np.argsort(others[0].logprob)
            assert (np.diff(solved.logit(others[0])[order]) > 0).all()  # the likelihood's own order
    assert None in strengths
    shuffled = np.random.default_rng(5).permutation(train[1])
    told, _ = fit_head(train[0], shuffled, (1, 2), OURS)
    assert np.abs(told.logit(test[0]) - told.logit(test[0]).mean()).mean() < 0.3  # grades that nothing tells


def test_it_is_the_least_of_the_penalised_score():
    """Against torch on the standardised columns as the docstring says them, without any rotation of them."""
    inputs, correct = graded(LEAST_FOR_STATES)
    solved, _ = fit_head(inputs, correct, (1, 2), OURS)
    assert solved.strength is not None
    few = HeadInputs(inputs.logprob[:-1], inputs.readings[:-1], inputs.states[:-1])
    assert fit_head(few, correct[:-1], (1, 2), OURS)[0].strength is None  # too few
    raw = torch.from_numpy(np.concatenate([inputs.readings, _states(inputs)], axis=1))
    x = (raw - raw.mean(0)) / raw.std(0, correction=0)
    x[:, len(READINGS) :] /= (x.shape[1] - len(READINGS)) ** 0.5
    w = torch.zeros(2 + x.shape[1], dtype=torch.float64, requires_grad=True)
    columns = torch.cat([torch.from_numpy(_offset(inputs.logprob))[:, None], torch.ones(len(x), 1).double(), x], 1)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    y = torch.from_numpy(correct).double()

    def loss():
        optimizer.zero_grad()
        logit = columns @ w
        value = (torch.nn.functional.softplus(logit) - y * logit).mean() + solved.strength / 2 * w[2:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    solved = replace(solved, outside=None)
    np.testing.assert_allclose(solved.logit(inputs), (columns @ w).detach().numpy(), atol=2e-3)


@pytest.mark.parametrize("centre", [-1.5, -10, -30, -60, -200])
def test_it_is_solved_for_at_every_length(centre, caplog):
    """The likelihood is Platt's map as scikit-learn finds it, and the states are used where they tell more."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    n = 600
    correct = rng.random(n) < 0.5
    noise = centre * (1 + 0.25 * rng.standard_normal(n))
    logprob = np.minimum(noise + 0.2 * abs(centre) * (2 * correct - 1), -1e-3)
    states = rng.normal(size=(n, 1, len(POSITIONS), 16))
    states[:, 0, 1, 0] += 1.5 * (2 * correct - 1)
    inputs = HeadInputs(logprob, rng.normal(size=(n, len(READINGS))), states)
    solved, held_out = fit_head(inputs, correct, (0,), OURS)
    offset = _offset(logprob)
    standard = ((offset - offset.mean()) / offset.std())[:, None]
    best = LogisticRegression(C=1e9, tol=1e-10, max_iter=9999).fit(standard, correct).predict_log_proba(standard)
    best = -best[np.arange(n), correct.astype(int)].mean()
    plain = solved.weights["plain"].astype(float)
    assert log_loss(plain[0] * offset + plain[1], correct) == pytest.approx(best, abs=1e-5)
    assert solved.strength is not None
    told = np.log(held_out / (1 - held_out))
    assert log_loss(told, correct) < best - 0.1
    assert not caplog.records


def test_a_solver_that_gains_nothing_says_so(caplog, monkeypatch):
    # As of long answers at slope 1: nothing bends, and every step is far too long.
    monkeypatch.setattr(confidence_head, "sigmoid", lambda x: np.full(np.shape(x), 1e-30))
    correct = (np.arange(40) % 4 > 0).astype(float)
    _solve(np.arange(40) // 4 % 2 * 1.0, np.zeros((40, 0)), correct, np.inf, None)
    assert "gains nothing" in caplog.text


def test_grades_that_nothing_tells_are_not_told_by_cross_validation():
    """Else an answer would have had a part in the head that told it, or a fold in the choice of its own strength."""
    inputs, correct = graded(600)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(correct)
        folds = np.array_split(rng.permutation(len(correct)), 5)
        pairs = [(np.setdiff1d(np.arange(len(correct)), fold), fold) for fold in folds]
        z = np.concatenate([inputs.readings, _states(inputs)], axis=1)
        z = (z - z.mean(0)) / z.std(0) / z.shape[1] ** 0.5
        _, held = _cross_validated(_offset(inputs.logprob), z, shuffled.astype(float), pairs)
        assert len(held) >= 4
        noise = np.sqrt((1 / correct.sum() + 1 / (~correct).sum()) / 12)  # of the AUROC of grades that nothing tells
        for told in held:
            assert abs(rank_order(told, shuffled) - 0.5) < 4 * noise
    assert rank_order(fit_head(inputs, correct, (1, 2), OURS)[1], correct) > 0.5 + 8 * noise  # where something does


def rank_order(told, correct):
    ranks = np.argsort(np.argsort(told))
    return (ranks[correct].mean() - ranks[~correct].mean()) / len(told) + 0.5


def test_main_directions_are_those_of_largest_variance():
    rng = np.random.default_rng(0)
    falling = np.linspace(3.0, 0.0, 300)
    x = (rng.normal(size=(700, 300)) * np.exp(falling) @ np.linalg.qr(rng.normal(size=(300, 300)))[0]).astype(
        np.float32
    )
    exact = np.linalg.svd(x, full_matrices=False)[2][:40]
    found = _main_directions(x, 40)
    assert found.shape == (40, 300)
    np.testing.assert_allclose(found @ found.T, np.eye(40), atol=1e-4)
    kept, best = (np.square(x @ one.T).sum() for one in (found, exact))
    assert kept > 0.97 * best
    np.testing.assert_allclose(
        np.square(_main_directions(x, 300) @ x.T).sum(), np.square(x).sum(), rtol=1e-4
    )  # all of it


def test_kept_and_refused(tmp_path):
    inputs, correct = graded(120)
    solved, _ = fit_head(inputs, correct, (1, 2), OURS)
    solved.save(tmp_path)
    again = FittedHead.load(tmp_path, OURS)
    assert again.mark == solved.mark
    far = HeadInputs(inputs.logprob, inputs.readings, inputs.states + 50.0)
    assert again.foreign(far).all()
    assert again.foreign(inputs).mean() < 0.1
    plain = again.weights["plain"]
    known = np.log(np.exp(inputs.logprob) / -np.expm1(inputs.logprob))
    np.testing.assert_allclose(
        again.logit(far), plain[0] * known + plain[1], rtol=1e-5
    )  # Platt's map of the likelihood
    assert (again.layers, again.losses, again.strength, again.n) == (solved.layers, solved.losses, solved.strength, 120)
    np.testing.assert_array_equal(again.logit(inputs), solved.logit(inputs))
    for other, words in (
        (Fingerprint("others", "template"), "weights weights"),
        (Fingerprint("weights", "x"), "template"),
    ):
        with pytest.raises(UserError, match=f"head made with .*{words}.*trained with alone"):
            FittedHead.load(tmp_path, other)
    with pytest.raises(UserError, match="reads states of shape"):
        solved.logit(HeadInputs(inputs.logprob, inputs.readings, inputs.states[:, :1]))
    (tmp_path / "confidence_head" / "head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="no confidence head that can be read"):
        FittedHead.load(tmp_path, OURS)
    with pytest.raises(UserError, match="9 of 120 answers are right"):
        fit_head(inputs, np.arange(120) < 9, (1, 2), OURS)

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from calibtrain.calibration.adaptive import token_temperatures
from calibtrain.calibration.calibrators import METHODS, Calibrator, cross_fit, fit_calibrator
from calibtrain.calibration.scores import TEMPERATURE_GRID, TokenScores, log_loss, logit, scores_of
from calibtrain.calibration.shift import target_accuracy
from calibtrain.calibration.unlabelled import fit_base_alignment, fit_label_shift
from calibtrain.errors import UserError

HASHES = {"template_hash": "t" * 64, "weights_hash": "w" * 64}
GRADED = [name for name in METHODS if name != "base_alignment"]


def token_tables(logits):
    """Log-probs (T, K) of the likeliest of logits (T, V) at every temperature of the grid."""
    z = logits[:, None, :] / np.array(TEMPERATURE_GRID)[None, :, None]
    z = z - z.max(-1, keepdims=True)
    return -np.log(np.exp(z).sum(-1))


def made(n=400, seed=0, factor=1.0, tokens=2):
    """Scores with every field, right as often as the likelihood at a temperature says, which depends on the domain.

    The last hidden unit of a token is +-1; the log of its true temperature is 0.6 times that.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, (n * tokens, 30))
    hidden = np.concatenate([rng.normal(0, 1, (n * tokens, 6)), rng.choice([-1.0, 1.0], (n * tokens, 1))], 1)
    owner = np.repeat(np.arange(n), tokens)
    table = token_tables(logits)
    answers = np.zeros((n, len(TEMPERATURE_GRID)))
    np.add.at(answers, owner, table)
    domains = [("north", "south")[i % 2] for i in range(n)]
    options = rng.normal(0, 2, (n, 4))
    scores = scores_of(
        answers,
        domains=domains,
        options=options,
        right=np.arange(4) == (options + np.random.default_rng(seed).gumbel(size=(n, 4))).argmax(1)[:, None],
        tokens=TokenScores(table, hidden, owner),
    )
    truth = np.exp(factor * 0.6 * hidden[:, -1])
    at = np.array([np.interp(np.log(t), np.log(TEMPERATURE_GRID), row) for t, row in zip(truth, table, strict=True)])
    chance = np.exp(np.bincount(owner, at))
    return scores, rng.random(n) < chance


@pytest.mark.parametrize("method", GRADED)
def test_every_method_keeps_the_contract(method):
    scores, correct = made(200)
    fitted = fit_calibrator(method, scores, correct, replicates=5, **HASHES)
    q = fitted.apply(scores)
    assert q.shape == (200,)
    assert q.dtype == np.float64
    assert ((q >= 0) & (q <= 1)).all()
    assert fitted.n == 200
    assert Calibrator.from_json(fitted.to_json(), **HASHES) == fitted
    again = Calibrator.from_json(fitted.to_json(), **HASHES).apply(scores)
    assert np.array_equal(again, q)
    for name in fitted.low:  # the intervals have the parameters' shape and order
        low, high = np.array(fitted.low[name]), np.array(fitted.high[name])
        assert low.shape == np.shape(fitted.parameters[name] if method != "isotonic" else fitted.parameters["y"])
        assert (low <= high).all()
    numeric = {k for k, v in fitted.parameters.items() if k != "names"} - {"log_x", "log_edges", "least"}
    assert set(fitted.low) == numeric
    order = np.random.default_rng(0).permutation(200)
    assert fitted.apply(scores.take(order)) == pytest.approx(q[order], abs=1e-12)


@pytest.mark.parametrize("method", GRADED)
@pytest.mark.parametrize("kind", ["all right", "all wrong", "one answer", "same confidence", "certain", "impossible"])
def test_degenerate_answers_leave_finite_probabilities(method, kind):
    n = 1 if kind == "one answer" else 30
    scores, correct = made(n)
    if kind in ("all right", "all wrong"):
        correct = np.full(n, kind == "all right")
    if kind in ("same confidence", "certain", "impossible"):
        fill = {"same confidence": np.log(0.3), "certain": 0.0, "impossible": -400.0}[kind]
        table = np.full((n, len(TEMPERATURE_GRID)), fill)
        per_token = TokenScores(table, np.ones((n, 3)), np.arange(n))
        right = np.eye(3)[np.arange(n) % 3]
        scores = scores_of(table, domains=["a"] * n, options=np.zeros((n, 3)), right=right, tokens=per_token)
    fitted = fit_calibrator(method, scores, correct, replicates=4, **HASHES)
    assert np.isfinite(fitted.apply(scores)).all()
    assert np.isfinite(fitted.nll_after)
    json.loads(fitted.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize("method", ["platt", "beta", "isotonic", "histogram"])
def test_a_miscalibrated_confidence_is_mended_on_new_answers(method):
    rng = np.random.default_rng(3)
    truth = rng.beta(1.2, 1.2, 6000)
    q = expit(2.2 * logit(truth) + 0.7)  # overconfident and shifted
    y = rng.random(6000) < truth
    fitted = fit_calibrator(method, q[:3000], y[:3000], replicates=0, **HASHES)
    mended = fitted.apply(q[3000:])
    assert np.abs(mended - truth[3000:]).mean() < 0.035
    assert log_loss(mended, y[3000:]) < log_loss(q[3000:], y[3000:]) - 0.05
    if method == "platt":
        assert fitted.parameters["slope"] == pytest.approx(1 / 2.2, abs=0.05)
        assert fitted.parameters["intercept"] == pytest.approx(-0.7 / 2.2, abs=0.12)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_isotonic_and_histogram_never_claim_certainty(pairs):
    q, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    for method in ("isotonic", "histogram"):
        p = fit_calibrator(method, q, y, replicates=0, **HASHES).apply(q)
        assert ((p > 0) & (p < 1)).all()
        if method == "isotonic":
            assert (np.diff(p[np.argsort(q, kind="stable")]) >= -1e-12).all()
        for tied in np.unique(q):
            assert len(set(p[q == tied])) == 1


def test_interval_of_a_parameter_covers_it_about_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        q = rng.beta(1, 1, 300)
        y = rng.random(300) < expit(0.5 * logit(q) + 0.3)
        fitted = fit_calibrator("platt", q, y, replicates=60, level=0.9, **HASHES)
        covered += fitted.low["slope"] <= 0.5 <= fitted.high["slope"]
    assert covered >= 29  # binomial(40, 0.9) falls below 29 once in 1,000


def test_cross_fitting_is_honest_where_fitting_is_not():
    rng = np.random.default_rng(0)
    q, y = rng.random(60), rng.random(60) < 0.5  # confidence that knows nothing
    inside = fit_calibrator("isotonic", q, y, replicates=0, **HASHES).apply(q)
    outside = cross_fit("isotonic", q, y, folds=6)
    assert log_loss(inside, y) < np.log(2)  # looks better than a coin on its own answers
    assert log_loss(outside, y) > np.log(2)
    scores, correct = made(60)
    for method in GRADED:
        assert np.isfinite(cross_fit(method, scores, correct, folds=3)).all()


def test_cross_fitting_keeps_the_answers_of_a_question_together():
    # Each question has two equal answers: a histogram that saw the twin would know the grade.
    q = np.repeat(np.linspace(0.01, 0.99, 40), 2)
    y = np.repeat(np.arange(40) % 2, 2)
    ids = np.repeat(np.arange(40), 2)
    together, apart = cross_fit("isotonic", q, y, ids=ids, folds=40), cross_fit("isotonic", q, y, folds=80)
    assert np.array_equal(together[::2], together[1::2])
    assert log_loss(together, y) > log_loss(apart, y)
    with pytest.raises(UserError, match="folds"):
        cross_fit("platt", q, y, ids=ids, folds=41)


def test_domain_temperatures_shrink_to_the_common_one():
    rng = np.random.default_rng(1)
    sizes = {"hot": 400, "cold": 400, "rare": 3}
    names = np.repeat(list(sizes), list(sizes.values()))
    tables = token_tables(rng.normal(0, 2.5, (len(names), 30)))
    truth = {"hot": np.log(2.0), "cold": np.log(0.5), "rare": np.log(8.0)}
    chance = [np.exp(np.interp(truth[d], np.log(TEMPERATURE_GRID), row)) for d, row in zip(names, tables, strict=True)]
    y = rng.random(len(names)) < chance
    fitted = fit_calibrator("domain_temperature", scores_of(tables, domains=names), y, **HASHES)
    temperature = dict(zip(fitted.parameters["names"], fitted.parameters["temperatures"], strict=True))
    assert temperature["hot"] == pytest.approx(2.0, rel=0.25)
    assert temperature["cold"] == pytest.approx(0.5, rel=0.25)
    rare = np.flatnonzero(names == "rare")
    alone = fit_calibrator("temperature", tables[rare], y[rare], replicates=0, **HASHES).temperature
    assert abs(np.log(temperature["rare"] / fitted.temperature)) < abs(np.log(alone / fitted.temperature))
    ends = {name: (low, high) for name, low, high in zip(fitted.parameters["names"], fitted.low["temperatures"],
                                                        fitted.high["temperatures"], strict=True)}  # fmt: skip
    assert ends["hot"][0] < 2.0 < ends["hot"][1]
    assert np.log(ends["rare"][1] / ends["rare"][0]) > 2 * np.log(ends["hot"][1] / ends["hot"][0])
    unseen = fitted.apply(scores_of(tables[:5], domains=["new"] * 5))
    at_common = [np.exp(np.interp(np.log(fitted.temperature), np.log(TEMPERATURE_GRID), row)) for row in tables[:5]]
    assert unseen == pytest.approx(at_common, abs=0.01)


def test_equal_domains_get_one_temperature():
    rng = np.random.default_rng(2)
    tables = token_tables(rng.normal(0, 2.5, (600, 30)))
    y = rng.random(600) < np.exp(tables[:, TEMPERATURE_GRID.index(1.0)])
    scores = scores_of(tables, domains=[str(i % 6) for i in range(600)])
    fitted = fit_calibrator("domain_temperature", scores, y, **HASHES)
    free = [fit_calibrator("temperature", tables[i::6], y[i::6], replicates=0, **HASHES).temperature for i in range(6)]
    assert np.std(np.log(fitted.parameters["temperatures"])) < 0.6 * np.std(np.log(free))


def test_adaptive_temperature_finds_what_the_hidden_state_says():
    scores, correct = made(1500, seed=4)
    new, graded = made(1500, seed=5)
    fitted = fit_calibrator("adaptive_temperature", scores, correct, replicates=0, **HASHES)
    one = fit_calibrator("temperature", scores, correct, replicates=0, **HASHES)
    assert log_loss(fitted.apply(new), graded) < log_loss(one.apply(new), graded) - 0.005
    hot = new.tokens.hidden[:, -1] > 0
    t = np.log(token_temperatures(fitted.parameters, new.tokens))
    assert t[hot].mean() - t[~hot].mean() == pytest.approx(1.2, abs=0.4)
    with pytest.raises(UserError, match="width 7"):
        fitted.apply(scores_of(new.table, tokens=TokenScores(new.tokens.table, np.ones((3000, 5)), new.tokens.answer)))


def test_adaptive_temperature_of_nothing_is_the_single_one():
    scores, correct = made(300)
    flat = scores_of(scores.table, tokens=TokenScores(scores.tokens.table, np.ones((600, 4)), scores.tokens.answer))
    fitted = fit_calibrator("adaptive_temperature", flat, correct, replicates=0, **HASHES)
    one = fit_calibrator("temperature", flat, correct, replicates=0, **HASHES)
    assert token_temperatures(fitted.parameters, flat.tokens) == pytest.approx(one.temperature, rel=0.02)


def test_vector_scaling_recovers_the_bias_of_an_option():
    rng = np.random.default_rng(6)
    z = rng.normal(0, 1.5, (6000, 3))
    p = np.exp(z - np.array([1.0, 0.0, 0.0]))  # the model likes the first option too much
    p /= p.sum(1, keepdims=True)
    right_option = (rng.random((6000, 1)) > p.cumsum(1)).sum(1)
    correct = right_option == z.argmax(1)
    fitted = fit_calibrator("vector", scores_of(options=z), correct, replicates=0, **HASHES)
    bias = np.array(fitted.parameters["bias"])
    assert bias - bias[1:].mean() == pytest.approx([-1, 0, 0], abs=0.25)
    assert np.abs(fitted.apply(scores_of(options=z)) - p[np.arange(6000), z.argmax(1)]).mean() < 0.02
    with pytest.raises(UserError, match="fitted on 3 options"):
        fitted.apply(scores_of(options=np.zeros((2, 4))))


@pytest.mark.parametrize("method", ["vector_scaling", "matrix_scaling"])
def test_scaling_of_all_options_recovers_what_made_the_model_wrong(method):
    rng = np.random.default_rng(8)
    z = rng.normal(0, 1.5, (6000, 3))
    scale, bias = (np.array([2.0, 1.0, 0.5]), np.array([-1.0, 0.0, 1.0]))
    truth = z * scale + bias
    if method == "matrix_scaling":
        truth = truth + 0.7 * z[:, [1, 2, 0]]  # the evidence for one option speaks for another too
    p = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
    right = np.arange(3) == (rng.random((6000, 1)) > p.cumsum(1)).sum(1)[:, None]
    given = z.argmax(1)
    correct = right[np.arange(6000), given]
    fitted = fit_calibrator(method, scores_of(options=z, right=right), correct, replicates=20, **HASHES)
    assert np.abs(fitted.option_probabilities(z) - p).mean() < 0.015
    # The answer stays the model's own, and what is said of it is its chance, also where another option is likelier now.
    said = fitted.apply(scores_of(options=z))
    assert said == pytest.approx(fitted.option_probabilities(z)[np.arange(6000), given], abs=1e-12)
    changed = fitted.option_probabilities(z).argmax(1) != given
    assert changed.mean() > 0.1
    assert said[changed].mean() == pytest.approx(correct[changed].mean(), abs=0.03)
    if method == "vector_scaling":
        assert fitted.parameters["scale"] == pytest.approx(scale, abs=0.15)
        low, high = (np.array(end["scale"]) for end in (fitted.low, fitted.high))
        assert (low < fitted.parameters["scale"]).all()
        assert (high > fitted.parameters["scale"]).all()
    with pytest.raises(UserError, match="fitted on 3 options, given 4"):
        fitted.apply(scores_of(options=np.zeros((2, 4))))
    with pytest.raises(UserError, match="right option"):
        fit_calibrator(method, scores_of(options=z), correct, replicates=0, **HASHES)


def test_odir_chooses_what_new_answers_ask_for():
    rng = np.random.default_rng(9)
    z = rng.normal(0, 1, (60, 8))
    right = np.arange(8) == (z + rng.gumbel(size=z.shape)).argmax(1)[:, None]  # calibrated already
    correct = right[np.arange(60), z.argmax(1)]
    fitted = fit_calibrator("matrix_scaling", scores_of(options=z, right=right), correct, replicates=0, **HASHES)
    assert fitted.parameters["regularisation"] >= 1000
    off = np.array(fitted.parameters["scale"]) * (1 - np.eye(8))
    assert np.abs(off).max() < 0.3


def test_label_shift_finds_the_new_accuracy_without_grades():
    rng = np.random.default_rng(7)

    def answers(n, accuracy):
        right = rng.random(n) < accuracy
        return np.where(right, rng.beta(3, 1.5, n), rng.beta(1.5, 3, n)), right

    q, y = answers(4000, 0.6)
    source = fit_calibrator("beta", q, y, replicates=0, **HASHES)
    q_new, y_new = answers(4000, 0.3)
    moved = fit_label_shift(source, q_new, float(y.mean()))
    assert moved.low["accuracy"] < 0.3 < moved.high["accuracy"]
    assert moved.parameters["accuracy"] == pytest.approx(0.3, abs=0.04)
    assert log_loss(moved.apply(q_new), y_new) < log_loss(source.apply(q_new), y_new) - 0.05
    graded = fit_calibrator("label_shift", source.apply(q_new[:500]), y_new[:500], replicates=40, **HASHES)
    assert graded.parameters["shift"] == pytest.approx(moved.parameters["shift"], abs=0.4)
    assert graded.low["shift"] < graded.parameters["shift"] < graded.high["shift"]
    assert graded.nll_after < graded.nll_before
    assert Calibrator.from_json(moved.to_json(), **HASHES).apply(q_new) == pytest.approx(moved.apply(q_new))
    with pytest.raises(UserError, match="weights"):
        Calibrator.from_json(moved.to_json(), **{**HASHES, "weights_hash": "x"})


def test_target_accuracy_is_the_fixed_point_of_the_em_algorithm():
    p = np.random.default_rng(8).beta(2, 3, 500)
    share = 0.5
    for _ in range(5000):
        right, wrong = share / 0.6 * p, (1 - share) / 0.4 * (1 - p)
        share = (right / (right + wrong)).mean()
    best, low, high = target_accuracy(p, 0.6)
    assert best == pytest.approx(share, abs=1e-5)
    assert low < best < high
    for bad in ((np.array([]), 0.5), (p, 1.0)):
        with pytest.raises(UserError, match="label shift"):
            target_accuracy(*bad)


def test_base_alignment_needs_no_grades_and_only_agreeing_answers():
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 2.5, (500, 30))
    tuned, base = token_tables(1.8 * logits), np.exp(token_tables(logits)[:, TEMPERATURE_GRID.index(1.0)])
    agrees = rng.random(500) < 0.7
    fitted = fit_base_alignment(tuned, np.where(agrees, base, 0.01), agrees, replicates=50, **HASHES)
    assert fitted.temperature == pytest.approx(1.8, rel=0.03)
    assert fitted.n == agrees.sum()
    assert Calibrator.from_json(fitted.to_json(), **HASHES) == fitted
    with pytest.raises(UserError, match="never give the same answer"):
        fit_base_alignment(tuned, base, np.zeros(500), **HASHES)
    with pytest.raises(UserError, match="fit_base_alignment"):
        fit_calibrator("base_alignment", tuned, agrees, **HASHES)


def test_what_a_method_lacks_is_named():
    q, y = np.linspace(0.1, 0.9, 20), np.arange(20) % 2
    for method, missing in {
        "temperature": "log-probs at each temperature",
        "domain_temperature": "at each temperature",
        "adaptive_temperature": "tokens",
        "vector": "options",
        "vector_scaling": "equally many options",
        "matrix_scaling": "equally many options",
        "platypus": "unknown method",
    }.items():
        with pytest.raises(UserError, match=missing):
            fit_calibrator(method, q, y, **HASHES)
    with pytest.raises(UserError, match="domain of each answer"):
        fit_calibrator("domain_temperature", made(20)[0].table, y, **HASHES)


@pytest.mark.parametrize(
    ("scores", "fields", "message"),
    [
        ([0.5, np.nan], {}, "answer 1"),
        ([0.5, 1.2], {}, "not a probability"),
        (np.zeros((3, 7)), {}, "log-prob table"),
        ([0.5], {"domains": ["a", "b"]}, "2 domains"),
        (None, {}, "give confidences"),
        (None, {"options": [[0.1]]}, "options have shape"),
        ([0.5], {"tokens": TokenScores(np.zeros((2, 25)), np.zeros((2, 3)), np.array([0, 1]))}, "not among the 1"),
        ([0.5], {"tokens": TokenScores(np.zeros((2, 9)), np.zeros((2, 3)), np.array([0, 0]))}, "expected"),
    ],
)
def test_malformed_scores_are_refused(scores, fields, message):
    with pytest.raises(UserError, match=message):
        scores_of(scores, **fields)


def test_malformed_grades_are_refused():
    for correct, message in (([1], "one grade"), ([1, 0.5], "0 or 1")):
        with pytest.raises(UserError, match=message):
            fit_calibrator("platt", [0.2, 0.4], correct, **HASHES)

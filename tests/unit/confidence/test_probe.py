"""A planted direction is found where it lies; state round-trips; a probe refuses a model that is not its own."""

from dataclasses import replace

import numpy as np
import pytest

from calibtrain.confidence.features import POSITIONS, Features, Fingerprint
from calibtrain.confidence.probe import KINDS, Probe, cost, fit_probe
from calibtrain.errors import UserError

PRINT = Fingerprint("a" * 64, "b" * 64)
N, LAYERS, WIDTH = 600, (3, 6, 9), 16
IDS = [f"question {i}" for i in range(N)]


def planted(layer=6, position="answer_mean", curved=False, seed=0):
    """Noise, with a direction at one place that tells right answers from wrong ones (by its size, if `curved`)."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(N, len(LAYERS), len(POSITIONS), WIDTH)).astype(np.float32) * 5 + 2
    signal = states[:, LAYERS.index(layer), POSITIONS.index(position), 0] - 2
    correct = np.abs(signal) > 3.4 if curved else signal + rng.normal(size=N) > 0
    parts = tuple(np.array_split(states, 3))
    return Features(parts, LAYERS, np.full(N, 20), PRINT), correct


def auroc(score, correct):
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(correct, score)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "position"), [(6, "answer_mean"), (9, "question_last")])
def test_a_planted_direction_is_found_in_its_layer(kind, layer, position):
    probe = fit_probe(*planted(layer, position), IDS, kind=kind)
    assert (probe.layer, probe.position) == (layer, position)
    others, correct = planted(layer, position, seed=1)
    score = probe.score(others)
    assert score.dtype == np.float64
    assert auroc(score, correct) > 0.93
    assert abs(score.mean() - correct.mean()) < 0.1


def test_only_the_mlp_finds_what_is_not_linear():
    others, correct = planted(curved=True, seed=1)
    found = {kind: auroc(fit_probe(*planted(curved=True), IDS, kind=kind).score(others), correct) for kind in KINDS}
    assert found["linear"] < 0.6
    assert found["mlp"] > 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_not_chosen_by_who_fits(kind):
    features, correct = planted(layer=6)
    probe = fit_probe(features, correct, IDS, kind=kind)
    from calibtrain.confidence.probe import _part

    choosing = np.array([_part(name, 0) == "choose" for name in IDS])
    swapped = np.concatenate(features.shards).copy()
    swapped[choosing] = np.roll(
        swapped[choosing], 1, axis=1
    )  # the direction is at 9 for those that choose, at 6 for the rest
    moved = replace(features, shards=(swapped,))
    losses = {one.layer: one.log_loss for one in reversed(fit_probe(moved, correct, IDS, kind=kind).candidates)}
    best = {one.layer: one.log_loss for one in reversed(probe.candidates)}
    assert best[6] < 0.45  # 0.69 is chance
    assert losses[6] > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trips_and_is_the_same_for_the_same_seed(kind, tmp_path):
    features, correct = planted()
    probe = fit_probe(features, correct, IDS, kind=kind, seed=3)
    probe.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.json", "probe.safetensors"]
    loaded = Probe.load(tmp_path, PRINT)
    assert np.array_equal(loaded.score(features), probe.score(features))
    assert (loaded.candidates, loaded.n, loaded.seed) == (probe.candidates, N, 3)
    again = fit_probe(features, correct, IDS, kind=kind, seed=3)
    assert np.array_equal(again.score(features), probe.score(features))


def test_a_linear_probe_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, correct = planted()
    probe = fit_probe(features, correct, IDS)
    states = features.at(probe.layer, probe.position)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=probe.candidates[0].strength)).fit(states, correct)
    np.testing.assert_allclose(probe.score(features), theirs.predict_proba(states)[:, 1], atol=2e-3)


def test_another_model_is_refused(tmp_path):
    features, correct = planted()
    probe = fit_probe(features, correct, IDS)
    probe.save(tmp_path)
    for other, what in ((Fingerprint("c" * 64, "b" * 64), "weights"), (Fingerprint("a" * 64, "c" * 64), "template")):
        with pytest.raises(UserError, match=f"probe made with .*{what}"):
            Probe.load(tmp_path, other)
        with pytest.raises(UserError, match=f"probe made with .*{what}"):
            probe.score(replace(features, fingerprint=other))
    narrow = replace(features, shards=tuple(shard[..., :8] for shard in features.shards))
    with pytest.raises(UserError, match="width 16, given 8"):
        probe.score(narrow)
    (tmp_path / "probe.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="no probe that can be read"):
        Probe.load(tmp_path, PRINT)


def test_mistakes_are_named():
    features, correct = planted()
    with pytest.raises(UserError, match="both right and wrong"):
        fit_probe(features, np.ones(N), IDS)
    with pytest.raises(UserError, match="none of linear, mlp"):
        fit_probe(features, correct, IDS, kind="forest")
    with pytest.raises(UserError, match="question ids"):
        fit_probe(features, correct, IDS[:5])


def test_cost_is_one_forward_pass_or_none():
    features, _ = planted()
    assert cost(features) == {"forward_passes": 1.0, "tokens": 20.0}
    assert cost(replace(features, forward_passes=0)) == {"forward_passes": 0.0, "tokens": 0.0}

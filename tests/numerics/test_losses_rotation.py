"""The rotation penalties: their zero sets, estimators, hand gradients, LoRA forms and shards, in float64."""

import itertools
import math

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses import rotation
from calibtrain.losses.rotation_lora import lora_sums
from calibtrain.losses.rotation_probes import (
    NAMES,
    Shard,
    estimator,
    identity_probes,
    penalty_norm,
    probe_size,
    rotation_penalty,
    run_together,
    sign_probes,
)
from calibtrain.spectral.polar import polar_factor

SHAPES = [(12, 7), (7, 12), (9, 9)]
GRAM = ("row_gram_drift", "column_gram_drift")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def skew(n, seed):
    square = normal(n, n, seed=seed)
    return square - square.mT


def exact(name, weight, initial, scale=1.0, budget=0.0):
    if name == "polar_drift":
        return rotation.polar_drift(weight, polar_factor(initial), initial.square().sum())
    if name == "angle_budget":
        return rotation.angle_budget(weight, initial, budget)
    if name in GRAM:
        return getattr(rotation, name)(weight, initial, scale)
    return getattr(rotation, name)(weight, initial)


def polar_of(name, initial):
    return polar_factor(initial) if name == "polar_drift" else None


def estimate(name, weight, initial, probes, scale=1.0, budget=0.0):
    polar = polar_of(name, initial)
    sums = estimator(
        name,
        Shard.whole(weight),
        Shard.whole(initial),
        probes,
        penalty_norm(name, initial),
        polar=None if polar is None else Shard.whole(polar),
        scale=scale,
        budget=budget,
    )
    return run_together([sums])[0]


def members(shape, seed=0):
    """What each kind of change makes of a random W0 of full rank. Returns (W0, {kind: W})."""
    out, inner = shape
    k = min(shape)
    w0 = normal(*shape, seed=seed)
    u, s, vt = torch.linalg.svd(w0, full_matrices=False)
    left, right, q = orthogonal(out, seed + 1), orthogonal(inner, seed + 2), orthogonal(k, seed + 3)
    symmetric = normal(k, k, seed=seed + 4)
    o0 = u @ vt
    stretched = symmetric + symmetric.mT
    return w0, {
        "same": w0.clone(),
        "scaled": 1.7 * w0,
        "left rotation": left @ w0,
        "right rotation": w0 @ right,
        "scaled left rotation": 1.7 * left @ w0,
        "scaled right rotation": 1.7 * w0 @ right,
        "both rotated": left @ w0 @ right,
        "shared rotation": 1.7 * u @ q @ torch.diag(s) @ q.mT @ vt,
        "other spectrum": u @ torch.diag(s * torch.linspace(0.5, 2.0, k, dtype=s.dtype)) @ vt,
        "symmetric factor": o0 @ (vt.mT @ stretched @ vt) if out >= inner else (u @ stretched @ u.mT) @ o0,
        "row skew": w0 + w0 @ skew(inner, seed + 5) * 0.1,
        "column skew": w0 + 0.1 * skew(out, seed + 6) @ w0,
        "noise": w0 + 0.3 * normal(*shape, seed=seed + 7),
    }


ZERO = {
    ("row_gram_drift", 1.0): {"same", "right rotation"},
    ("row_gram_drift", None): {"same", "scaled", "right rotation", "scaled right rotation"},
    ("column_gram_drift", 1.0): {"same", "left rotation"},
    ("column_gram_drift", None): {"same", "scaled", "left rotation", "scaled left rotation"},
    ("polar_drift", 1.0): {"same", "scaled", "shared rotation", "other spectrum", "symmetric factor"},
    ("row_stretch", 1.0): {"same", "row skew"},
    ("column_stretch", 1.0): {"same", "column skew"},
    ("angle_budget", 1.0): {"same"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "scale"), ZERO)
def test_zero_set_is_the_stated_one(name, scale, shape):
    """Random members of the set score zero, members of the others' sets and noise do not."""
    for seed in (0, 100):
        w0, changed = members(shape, seed)
        values = {kind: float(exact(name, weight, w0, scale)) for kind, weight in changed.items()}
        assert {kind for kind, value in values.items() if value < 1e-20} == ZERO[name, scale]
        assert min(value for value in values.values() if value >= 1e-20) > 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_no_member_outside_the_orbit_scores_zero(shape):
    """W with the Gram matrix of W0 is W0 R: the orthogonal R is found from W and W0 alone. Likewise the polar structure."""
    w0, changed = members(shape, 7)
    for kind in ("right rotation", "scaled right rotation"):
        weight = changed[kind]
        scale = float((weight.norm() / w0.norm()) ** 2)
        r = polar_factor(w0.mT @ weight)
        if shape[0] < shape[1]:
            # Any rotation that agrees on the row space of W0 will do.
            assert torch.allclose(weight, math.sqrt(scale) * w0 @ r, atol=1e-9) or torch.allclose(
                weight @ weight.mT, scale * w0 @ w0.mT
            )
        else:
            assert torch.allclose(weight, math.sqrt(scale) * w0 @ r, atol=1e-9)
    tall = (lambda x: x) if shape[0] >= shape[1] else (lambda x: x.mT)
    factor = tall(polar_factor(w0)).mT @ tall(changed["shared rotation"])
    assert torch.allclose(factor, factor.mT)
    assert torch.allclose(tall(polar_factor(w0)) @ factor, tall(changed["shared rotation"]))


def test_angle_budget_is_a_ball():
    w0 = normal(5, 8, seed=1)
    direction = normal(5, 8, seed=2)
    direction *= w0.norm() / direction.norm()
    assert rotation.angle_budget(w0 + 0.099 * direction, w0, 0.1) == 0
    assert float(rotation.angle_budget(w0 + 0.2 * direction, w0, 0.1)) == pytest.approx(0.03)
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = w0 @ torch.block_diag(turn, turn, turn, turn)
    assert float(rotation.angle_budget(turned, w0).sqrt()) == pytest.approx(2 * math.sin(0.15))


def test_free_scale_is_the_best_one():
    w0, changed = members((9, 6), 3)
    for name in GRAM:
        best = float(exact(name, changed["noise"], w0, None))
        grid = [float(exact(name, changed["noise"], w0, a)) for a in torch.linspace(0.5, 2.0, 301).tolist()]
        assert best <= min(grid) < best * 1.001
        gram, first = (w.mT @ w if name == GRAM[1] else w @ w.mT for w in (changed["noise"], w0))
        cosine = (gram * first).sum() / gram.norm() / first.norm()
        assert best == pytest.approx(float((gram.norm() / first.norm()) ** 2 * (1 - cosine**2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "scale"), [*((name, 1.0) for name in NAMES), *((name, a) for name in GRAM for a in (None, 1.3))]
)
def test_identity_probes_are_exact_and_hand_gradients_are_autograds(name, scale, shape):
    w0 = normal(*shape, seed=11)
    weight = (w0 + 0.2 * normal(*shape, seed=12)).requires_grad_()
    value = exact(name, weight, w0, scale, budget=0.05)
    (expected,) = torch.autograd.grad(value, weight)
    probes = identity_probes(probe_size(name, shape), torch.float64)
    found = estimate(name, weight.detach(), w0, probes, scale, budget=0.05)
    gradient = found.left @ found.right.mT + found.drift_factor * (weight.detach() - w0)
    assert float(found.value) == pytest.approx(value.item(), rel=1e-9)
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()
    assert float(found.squared_gradient()) == pytest.approx(float(expected.square().sum()), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_estimator(name, shape):
    w0 = normal(*shape, seed=21)
    weight = (w0 + 0.2 * normal(*shape, seed=22)).requires_grad_()
    probes = sign_probes(probe_size(name, shape), 3, generator(1), torch.float64)
    norm = penalty_norm(name, w0)

    def penalty(w):
        return rotation_penalty(name, w, w0, probes, norm, polar=polar_of(name, w0))

    assert torch.autograd.gradcheck(penalty, weight)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "angle_budget"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_estimators_are_unbiased(name, shape):
    """Value and a direction of the gradient: the mean of 10,000 draws (100 of 100) is within 3 standard errors."""
    w0 = normal(*shape, seed=31)
    weight = w0 + 0.2 * normal(*shape, seed=32)
    truth = weight.clone().requires_grad_()
    value = exact(name, truth, w0, 1.2 if name in GRAM else 1.0)
    (gradient,) = torch.autograd.grad(value, truth)
    direction = normal(*shape, seed=33)
    draws, rng = [], generator(5)
    for _ in range(100):
        probes = sign_probes(probe_size(name, shape), 100, rng, torch.float64)
        found = estimate(name, weight, w0, probes, 1.2 if name in GRAM else 1.0)
        draws.append([found.value, ((direction.mT @ found.left) * found.right).sum()])
    drawn = torch.tensor(draws)
    errors = drawn.std(0) / 10.0
    expected = torch.stack([value.detach(), (gradient * direction).sum()])
    assert ((drawn.mean(0) - expected).abs() < 3 * errors).all()
    assert (errors > 0).all()


def test_free_scale_estimate_is_zero_where_the_penalty_is_and_tends_to_it():
    w0, changed = members((12, 7), 5)
    for name, kind in (("row_gram_drift", "scaled right rotation"), ("column_gram_drift", "scaled left rotation")):
        probes = sign_probes(probe_size(name, (12, 7)), 4, generator(2), torch.float64)
        assert float(estimate(name, changed[kind], w0, probes, None).value) < 1e-20
        weight = w0 + 0.2 * normal(12, 7, seed=9)
        many = sign_probes(probe_size(name, (12, 7)), 20_000, generator(3), torch.float64)
        assert float(estimate(name, weight, w0, many, None).value) == pytest.approx(
            float(exact(name, weight, w0, None)), rel=0.03
        )
    with pytest.raises(UserError, match="at least 2 probes"):
        estimate("row_gram_drift", w0, w0, sign_probes(12, 1, generator(1), torch.float64), None)


def test_small_drift_survives_fp32():
    """At a relative drift of 1e-4 the fp32 estimate still has six digits."""
    w0 = normal(48, 32, seed=41).float()
    weight = w0 + 1e-4 * normal(48, 32, seed=42).float()
    for name in NAMES:
        probes = sign_probes(probe_size(name, (48, 32)), 4, generator(1))
        found = estimate(name, weight, w0, probes)
        double = estimate(name, weight.double(), w0.double(), probes.double())
        assert float(found.value) == pytest.approx(float(double.value), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_form_is_the_dense_penalty(name, shape):
    """Value and gradients to both factors, whole and as the sum of two ranks' parts."""
    out, inner = shape
    w0, r, s = normal(*shape, seed=51), 3, 0.7
    a = (0.3 * normal(r, inner, seed=52)).requires_grad_()
    b = (0.3 * normal(out, r, seed=53)).requires_grad_()
    value = exact(name, w0 + s * b @ a, w0)
    expected = torch.autograd.grad(value, (a, b))
    norm = penalty_norm(name, w0)
    polar = polar_of(name, w0)
    whole = Shard.whole(w0 if polar is None else polar)
    (found,) = run_together([lora_sums(name, a.detach(), b.detach(), whole, s, norm)])
    cut = 31  # in the middle of a row
    pieces = Shard(shape, 0, whole.flat[:cut]), Shard(shape, cut, whole.flat[cut:])
    zero_a, zero_b = torch.zeros_like(a), torch.zeros_like(b)
    ranks = [
        lora_sums(name, a.detach(), zero_b, pieces[0], s, norm),
        lora_sums(name, zero_a, b.detach(), pieces[1], s, norm),
    ]
    for result in (found, *_in_lockstep(ranks)):
        assert float(result[0]) == pytest.approx(value.item(), rel=1e-9)
        for gradient, one in zip(result[1:], expected, strict=True):
            assert (gradient - one).norm() <= 1e-9 * one.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shards_give_the_dense_gradient(name, shape):
    """Three ranks with pieces that begin and end within rows: same value, and each rank's own part of the gradient."""
    w0 = normal(*shape, seed=61)
    weight = w0 + 0.2 * normal(*shape, seed=62)
    probes = sign_probes(probe_size(name, shape), 3, generator(4), torch.float64)
    norm = penalty_norm(name, w0)
    expected = estimate(name, weight, w0, probes)
    gradient = expected.left @ expected.right.mT + expected.drift_factor * (weight - w0)
    size = weight.numel()
    cuts = [0, 4, size // 2 + 1, size]
    flat, first, polar = weight.view(-1), w0.view(-1), polar_of(name, w0)
    ranks, own = [], []
    for begin, end in itertools.pairwise(cuts):
        piece = Shard(shape, begin, flat[begin:end].clone())
        own.append(piece)
        part = None if polar is None else piece.like(polar.reshape(-1)[begin:end])
        ranks.append(estimator(name, piece, piece.like(first[begin:end]), probes, norm, polar=part))
    for piece, found in zip(own, _in_lockstep(ranks), strict=True):
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-12)
        update = piece.like(torch.zeros_like(piece.flat))
        update.add_product(found.left, found.right, 1.0)
        begin = piece.start
        drift = piece.flat - w0.view(-1)[begin : begin + piece.flat.numel()]
        result = update.flat + found.drift_factor * drift
        wanted = gradient.reshape(-1)[begin : begin + piece.flat.numel()]
        assert (result - wanted).norm() <= 1e-12 * gradient.norm()


def _in_lockstep(ranks):
    """Run the estimators of all ranks of one matrix, each sent the sum of what they yield."""
    finished = [None] * len(ranks)
    parts = [next(one) for one in ranks]
    while parts:
        total, parts = sum(parts), []
        for i, one in enumerate(ranks):
            try:
                parts.append(one.send(total.clone()))
            except StopIteration as stopped:
                finished[i] = stopped.value
    return finished


@pytest.mark.parametrize("shape", [(5, 4), (1, 6), (6, 1)])
def test_every_cut_of_a_matrix_multiplies_like_the_whole(shape):
    matrix = normal(*shape, seed=71)
    right, left = normal(shape[1], 2, seed=72), normal(shape[0], 2, seed=73)
    for begin in range(matrix.numel()):
        for end in range(begin, matrix.numel() + 1):
            mask = torch.zeros(matrix.numel(), dtype=torch.float64)
            mask[begin:end] = 1
            part = matrix * mask.view(shape)
            shard = Shard(shape, begin, matrix.view(-1)[begin:end])
            assert torch.allclose(shard.apply(right), part @ right)
            assert torch.allclose(shard.apply_transposed(left), part.mT @ left)
            assert torch.allclose(shard.T.apply(left), part.mT @ left)


def test_unknown_name_lists_the_known_ones():
    w0 = normal(3, 3, seed=1)
    with pytest.raises(UserError, match="row_gram_drift, column_gram_drift, polar_drift"):
        rotation_penalty("rotation", w0, w0, identity_probes(3), 1.0)


def test_what_an_estimator_lacks_is_said():
    w0 = normal(3, 3, seed=1)
    with pytest.raises(UserError, match="takes probes"):
        rotation_penalty("row_stretch", w0, w0, None, 1.0)
    with pytest.raises(UserError, match=r"polar\(W0\)"):
        rotation_penalty("polar_drift", w0, w0, identity_probes(3), 1.0)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_lora_form_is_the_dense_penalty_of_pefts_weights(name):
    """The weight that PEFT merges, rank-stabilised scaling and all, and its gradients to PEFT's own parameters."""
    peft = pytest.importorskip("peft", reason="LoRA is PEFT's")
    base = torch.nn.Sequential(torch.nn.Linear(7, 12, bias=False, dtype=torch.float64))
    with torch.no_grad():
        base[0].weight.copy_(normal(12, 7, seed=91))
    w0 = base[0].weight.detach().clone()
    settings = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(base, settings, autocast_adapter_dtype=False).base_model.model[0]
    a, b = (getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B"))
    value = exact(name, w0 + layer.get_delta_weight("default"), w0)
    expected = torch.autograd.grad(value, (a, b))
    reference = Shard.whole(w0 if name != "polar_drift" else polar_factor(w0))
    sums = lora_sums(name, a.detach(), b.detach(), reference, layer.scaling["default"], penalty_norm(name, w0))
    ((found, *gradients),) = run_together([sums])
    assert float(found) == pytest.approx(value.item(), rel=1e-9)
    for gradient, one in zip(gradients, expected, strict=True):
        assert (gradient - one).norm() <= 1e-9 * one.norm()
    layer.merge()
    assert float(exact(name, layer.base_layer.weight.detach(), w0)) == pytest.approx(value.item(), rel=1e-9)

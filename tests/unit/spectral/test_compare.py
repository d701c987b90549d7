"""Constructed changes are named rightly, numbers are those of two float64 SVDs, and noise is called noise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.spectral import Settings, compare
from calibtrain.spectral.compare import compare_matrix, judge
from calibtrain.spectral.null import TESTS
from calibtrain.spectral.verdict import findings, summary
from tests.unit.spectral.truth import KINDS, by_svd, pair

SHAPES = ((48, 48), (72, 40), (40, 72))


@pytest.mark.parametrize("kind", KINDS)
def test_a_constructed_change_is_named_rightly_in_95_of_100_draws(kind):
    found = Counter(compare(*pair(kind, SHAPES[seed % 3], seed, repeated=seed % 2 == 1))["kind"] for seed in range(100))
    assert found[kind] >= 95, found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_agrees_with_two_float64_svds(kind, shape):
    w0, w = pair(kind, shape, 7)
    row, true = compare(w0, w), by_svd(w0, w)
    told = {
        "relative_drift": row["relative_drift"],
        "spectral_norm_ratio": row["spectral_norm_ratio"],
        "stable_rank": row["stable_rank"][1],
        "median": row["scale"]["median"],
        "spread": row["scale"]["spread"],
        "alpha": row["scale"]["alpha"],
        "nf": row["consistency"]["nf"],
        "polar_drift": row["drift"]["polar_drift"],
        "row_gram_drift": row["drift"]["row_gram_drift"],
        "scale": row["tests"]["scale"]["value"],
    }
    assert told == pytest.approx({key: true[key] for key in told}, rel=1e-6, abs=1e-9)
    assert row["angles"]["subspaces"][1]["left"] == pytest.approx(true["angle_8"], rel=1e-6, abs=1e-5)
    if kind not in ("scale", "shared rotation"):  # there it is 0, and 0/0
        assert row["tests"]["shared_rotation"]["value"] == pytest.approx(true["shared_rotation"], rel=1e-6)


def test_a_bfloat16_pair_is_measured_to_the_last_bit_it_holds():
    w0, w = (one.bfloat16() for one in pair("noise", (72, 40), 3))
    row, true = compare(w0, w), by_svd(w0, w)
    assert row["drift"]["polar_drift"] == pytest.approx(true["polar_drift"], rel=1e-5)
    assert row["relative_drift"] == pytest.approx(true["relative_drift"], rel=1e-12)


def test_shares_add_up_and_the_fit_cannot_be_bettered():
    w0, w = pair("noise", (72, 40), 1)
    shares = compare(w0, w)["shares"]
    assert shares["scale"] + shares["shared_rotation"] + shares["rest"] == pytest.approx(1, abs=1e-12)
    assert sum(shares["of_rest"].values()) == pytest.approx(shares["rest"], abs=1e-12)
    w0, w = pair("shared rotation", (72, 40), 1)
    assert compare(w0, w)["shares"]["rest"] < 1e-12


@pytest.mark.parametrize(("size", "closely"), [(0.003, 1.4), (0.01, 1.05), (0.03, 1.02)])
def test_rounding_to_bfloat16_is_told_from_a_change(size, closely):
    """What rounding did is the stored change less the change that was meant; the estimate is a little above."""
    w0 = pair("noise", (128, 128), 0)[0].bfloat16()
    meant = torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    meant *= size * w0.double().norm() / meant.norm()
    stored = (w0.double() + meant).bfloat16()
    change = stored.double() - w0.double()
    true = float(((change - meant).norm() / change.norm()) ** 2)
    assert 0.97 * true < compare(w0, stored)["rounding_share"] < closely * true


def test_float64_matrices_are_not_rounded():
    assert compare(*pair("noise", (40, 40), 0))["rounding_share"] < 1e-20


def test_equal_matrices_are_unchanged():
    w0, _ = pair("noise", (40, 48), 0)
    row = compare(w0, w0.clone())
    assert row["kind"] == "unchanged"
    assert row["update_rank"] == 0
    assert row["consistency"]["nf"] == pytest.approx(0, abs=1e-7)
    assert all(math.isnan(row["tests"][name]["p"]) or not row["tests"][name]["beyond"] for name in TESTS)


def test_an_orthogonal_matrix_that_grew_was_not_turned():
    """All singular values are one: their vectors have no direction, and no angle may come of that."""
    q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    row = compare(q, 1.1 * q)
    assert row["kind"] == "scale"
    assert max(row["angles"]["left"], row["angles"]["right"], row["angles"]["shared"]) < 1e-4


def test_the_top_triples_alone_tell_the_same_of_what_they_see():
    w0, w = pair("shared rotation", (96, 64), 0)
    whole, top = compare(w0, w), compare(w0, w, Settings(rank=24))
    assert top["rank"] == 24
    assert top["basis_error"] < 1e-2
    assert top["spectral_norm_ratio"] == pytest.approx(whole["spectral_norm_ratio"], rel=1e-4)
    assert top["relative_drift"] == pytest.approx(whole["relative_drift"], rel=1e-5)
    assert top["drift"]["polar_drift"] == pytest.approx(whole["drift"]["polar_drift"], abs=1e-6)
    noise = compare(*pair("noise", (96, 64), 0), Settings(rank=24))
    assert not any(noise["tests"][name]["beyond"] for name in TESTS)
    assert noise["consistency"]["null_low"] < noise["consistency"]["nf"] < noise["consistency"]["null_high"]


def test_factors_of_an_adapter_give_the_row_of_the_merged_matrix():
    w0, _ = pair("noise", (72, 40), 0)
    draw = torch.Generator().manual_seed(1)
    b, a = (0.01 * torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((72, 4), (4, 40)))
    merged = compare_matrix("w", w0, w0 + b @ a, Settings())
    closed = compare_matrix("w", w0, w0 + b @ a, Settings(), (b, a))
    judge([merged], 0.05)
    judge([closed], 0.05)
    assert merged["update_rank"] == closed["update_rank"] <= 4
    assert merged["kind"] == closed["kind"] == "low rank"
    assert closed["relative_drift"] == pytest.approx(merged["relative_drift"], rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (2, 2)])
def test_matrices_with_hardly_a_direction_are_told_too(shape):
    w0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    row = compare(w0, w0 + 0.1)
    assert row["rank"] == min(shape)
    assert summary([row])["changed"] == 1
    assert findings(summary([row]), 0.05)


def test_state_dicts_are_compared_by_name_and_order_changes_nothing():
    pairs = {f"layer.{i}": pair("noise", (24, 24), i) for i in range(3)}
    base = {name: one[0] for name, one in pairs.items()} | {"norm": torch.ones(24), "old": torch.ones(2, 2)}
    tuned = {name: one[1] for name, one in pairs.items()} | {"norm": torch.ones(24)}
    found = compare(base, tuned)
    assert [row["name"] for row in found["matrices"]] == list(pairs)
    assert {one["name"] for one in found["left_out"]} == {"norm", "old"}
    backwards = compare(dict(reversed(base.items())), tuned)
    assert json.dumps(backwards["matrices"][::-1]) == json.dumps(found["matrices"])


@pytest.mark.parametrize(
    ("base", "tuned", "says"),
    [
        (torch.ones(3, 2), torch.ones(2, 3), r"\(3, 2\) against \(2, 3\)"),
        (torch.eye(2), torch.full((2, 2), math.nan), "the tuned weights hold NaN"),
        (torch.zeros(2, 2), torch.eye(2), "0 everywhere in the base"),
        (torch.eye(2), {"w": torch.eye(2)}, "not one of each"),
        ({"w": torch.ones(3)}, {"w": torch.ones(3)}, "share no matrix"),
    ],
)
def test_a_mistake_is_one_clear_line(base, tuned, says):
    with pytest.raises(UserError, match=says):
        compare(base, tuned)


@pytest.mark.parametrize("wrong", [{"null_seeds": 1}, {"rank": 0}, {"level": 1.0}])
def test_settings_that_tell_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        Settings(**wrong)


def test_comparing_needs_torch_alone():
    code = (
        "import sys; from calibtrain.spectral import compare; "
        "print([m for m in ('transformers', 'safetensors', 'scipy', 'deepspeed', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

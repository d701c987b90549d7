"""Weight penalties and spectra on ZeRO shards: what the whole matrices give, without gathering them, and exact resume."""

import json
import sys
import zlib

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.losses.rotation_lora import lora_sums
from calibtrain.losses.rotation_probes import (
    NAMES,
    Shard,
    estimator,
    identity_probes,
    penalty_norm,
    probe_size,
    run_together,
    sign_probes,
)
from calibtrain.spectral.polar import polar_factor
from tests.distributed.jobs import metrics, trained, write_job
from tests.distributed.ranks import forked, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

PROBES = 4
SPECTRA = ["layers.0.self_attn", "down_proj"]
CASES = {
    "stage0": {"training": {"zero_stage": 0}},
    "stage1": {"training": {"zero_stage": 1}},
    "stage2": {"training": {"zero_stage": 2}},
    "stage3": {"training": {"zero_stage": 3}},
    "bf16": {"training": {"zero_stage": 2}, "model": {"dtype": "bf16"}},
    "offload": {"training": {"zero_stage": 3, "offload_optimizer": True}},
    "lora1": {"training": {"zero_stage": 1}, "model": {"lora": {"r": 3}}},
    "lora3": {"training": {"zero_stage": 3}, "model": {"lora": {"r": 3}}},
}


def penalties(**settings):
    every = {"probes": PROBES, "target_modules": ["q_proj", "k_proj", "down_proj"], "layer_fraction": 1.0, **settings}
    return [{"name": name, **every} for name in NAMES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for name, sections in CASES.items():
        tracking = {"spectra_every": 1, "spectra_modules": SPECTRA}
        write_job(folder, name, **sections, penalties=[], weight_penalties=penalties(), tracking=tracking)
    script = __file__.replace("test_weight_penalty", "penalty_cases")
    ended = run(forked(2, script, str(folder)), folder)
    assert ended.code == 0, ended.output[-6000:]
    start = load_file(folder / "tiny" / "model.safetensors")
    return {name: torch.load(folder / f"{name}-2.pt", weights_only=True) for name in CASES}, start


def base_weight(start, key, dtype=torch.float32):
    return start[f"{key.split(' ')[1]}.weight"].to(dtype).double()


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("lora")])
def test_sharded_gradient_is_the_dense_one(results, case):
    found, start = results[0][case], results[1]
    assert len(found) == len(NAMES) * 6 + 1
    for key, one in found.items():
        if key == "spectra":
            continue
        penalty = key.split(" ")[0]
        w0 = base_weight(start, key, torch.bfloat16 if case == "bf16" else torch.float32)
        assert torch.equal(one["before"][0].double(), w0), key
        weight = one["moved"][0].double()
        size = probe_size(penalty, tuple(weight.shape))
        probes = None if penalty == "angle_budget" else sign_probes(size, PROBES, torch.Generator().manual_seed(3))
        polar = polar_factor(w0.float()).double() if penalty == "polar_drift" else None
        sums = estimator(
            penalty,
            Shard.whole(weight),
            Shard.whole(w0),
            None if probes is None else probes.double(),
            penalty_norm(penalty, w0),
            polar=None if polar is None else Shard.whole(polar),
        )
        (expected,) = run_together([sums])
        gradient = expected.left @ expected.right.mT + expected.drift_factor * (weight - w0)
        assert distance(one["gradients"][0], gradient) < 1e-6, key
        assert float(one["value"]) == pytest.approx(float(expected.value), rel=1e-6)


@pytest.mark.parametrize("case", ["lora1", "lora3"])
def test_lora_gradient_on_shards_is_the_dense_one(results, case):
    found, start = results[0][case], results[1]
    assert len(found) == len(NAMES) * 6 + 1
    for key, one in found.items():
        if key == "spectra":
            continue
        penalty, w0 = key.split(" ")[0], base_weight(start, key)
        a, b = (part.double() for part in one["moved"])
        reference = Shard.whole(polar_factor(w0.float()).double() if penalty == "polar_drift" else w0)
        sums = lora_sums(penalty, a, b, reference, 32.0 / 3, penalty_norm(penalty, w0))
        ((value, *gradients),) = run_together([sums])
        assert float(one["value"]) == pytest.approx(float(value), rel=1e-5)
        for part, expected in zip(one["gradients"], gradients, strict=True):
            assert distance(part, expected) < 2e-6, key


def dense_reading(name, w0, weight, exact):
    """What is logged of W (out, in), in float64 from the whole matrix: by SVD and, unless `exact`, by the same probes."""
    drift = weight - w0
    first, now = (torch.linalg.svdvals(one) for one in (w0, weight))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    expected = {
        "relative_drift": float(drift.norm() / w0.norm()),
        "alpha": float(1 + (drift * w0).sum() / w0.square().sum()),
        "spectral_norm_ratio": float(now[0] / first[0]),
        "stable_rank": float(weight.square().sum() / now[0] ** 2),
    }
    for penalty in NAMES[:-1]:
        size = probe_size(penalty, tuple(w0.shape))
        probes = identity_probes(size) if exact or size <= 16 else sign_probes(size, 16, generator)
        norm, polar = penalty_norm(penalty, w0), Shard.whole(polar_factor(w0))
        sums = estimator(penalty, Shard.whole(weight), Shard.whole(w0), probes.double(), norm, polar=polar)
        (found,) = run_together([sums])
        expected[penalty] = float(found.value)
    return expected


@pytest.mark.parametrize("case", CASES)
def test_spectra_read_on_shards_are_those_of_the_whole_matrices(results, case):
    found, start = results[0][case]["spectra"], results[1]
    assert found["untouched"]
    names = [f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"]
    names += [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert sorted(found["read"]) == sorted(names)
    for name in names:
        w0 = base_weight(start, f"- {name}", torch.bfloat16 if case == "bf16" else torch.float32)
        moved = [one.double() for one in found["moved"][name]]
        weight = w0 + 32.0 / 3 * moved[1] @ moved[0] if case.startswith("lora") else moved[0]
        expected = dense_reading(name, w0, weight, exact=case.startswith("lora"))
        assert 0.003 < expected["relative_drift"] < 0.5
        assert found["read"][name] == pytest.approx(expected, rel=1e-5), name
        for key in ("relative_drift", "alpha"):
            assert found["read"][name][key] == pytest.approx(expected[key], rel=1e-6), name
        stable_rank = w0.square().sum() / torch.linalg.matrix_norm(w0, 2) ** 2
        begun = {"alpha": 1, "spectral_norm_ratio": 1, "stable_rank": float(stable_rank)}
        unmoved = dict.fromkeys(expected, 0) | begun
        assert found["start"][name] == pytest.approx(unmoved, rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("case", CASES)
def test_each_rank_keeps_its_share_of_the_matrices(results, case):
    read = results[0][case]["spectra"]["read"]
    whole = sum(results[1][f"{name}.weight"].numel() for name in read)
    assert 0 < results[0][case]["spectra"]["elements"] < whole


RESUMED = {
    1: {"model": {"dtype": "bf16"}},
    2: {"model": {"lora": {"r": 2}}},
    3: {},
}


FREE = 3  # the stage that also runs without penalties


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Whole runs of 6 steps, the same from their checkpoint at step 4, one without penalties, and that with readings."""
    folder = tmp_path_factory.mktemp("resume")
    held = penalties(layer_fraction=0.5, weight=300.0)
    configs = {"whole": [], "resumed": [], "free": [], "read": []}
    for stage, sections in RESUMED.items():
        rest = {"training": {"zero_stage": stage, "keep_checkpoints": 9}, "penalties": [], **sections}
        for kind, found in configs.items():
            if kind in ("free", "read") and stage != FREE:
                continue
            sections = {**rest, "weight_penalties": [] if kind in ("free", "read") else held}
            every = {"free": 0, "read": 1}.get(kind, 5)
            sections["tracking"] = {"spectra_every": every, "spectra_modules": "all-linear"}
            if kind == "resumed":
                from_step = folder / f"whole{stage}" / "checkpoints" / "step-0000004"
                sections["training"] = {**rest["training"], "resume": str(from_step)}
            found.append(write_job(folder, f"{kind}{stage}", **sections))
    for kind, found in configs.items():
        ended = run(trained(2, *found), folder, 400)
        assert ended.code == 0, (kind, ended.output[-6000:])
    return folder


def weights_and_log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {
        line["step"]: {key: value for key, value in line.items() if "weight_penalty" in key}
        for line in lines
        if line["event"] == "log"
    }
    for line in lines:
        if line["event"] == "spectra":
            logged[line["step"]] |= {key: value for key, value in line.items() if key.startswith("spectra/")}
    return load_file(folder / "model" / "model.safetensors"), logged


@pytest.mark.slow
@pytest.mark.parametrize("stage", RESUMED)
def test_resumed_run_is_bit_exact(resumed, stage):
    whole, logged = weights_and_log(resumed / f"whole{stage}")
    again, logged_again = weights_and_log(resumed / f"resumed{stage}")
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    assert {key for key in logged[6] if key.startswith("train/")} == {f"train/weight_penalty/{name}" for name in NAMES}
    for step in (5, 6):  # every five steps, and after the last
        assert sum(key.startswith("spectra/model.layers.") for key in logged[step]) == 14 * 9
    assert all(logged[step] == logged_again[step] for step in (5, 6))


@pytest.mark.slow
def test_penalties_change_the_weights_they_name_and_hold_them(resumed):
    held, _ = weights_and_log(resumed / f"whole{FREE}")
    free, logged = weights_and_log(resumed / f"free{FREE}")
    start = load_file(resumed / "tiny" / "model.safetensors")
    assert not any(logged.values())
    for name in held:
        if any(one in name for one in ("q_proj", "k_proj", "down_proj")):
            assert (held[name] - start[name]).norm() < (free[name] - start[name]).norm(), name


@pytest.mark.slow
def test_reading_changes_neither_the_weights_nor_other_numbers(resumed):
    free, read = resumed / f"free{FREE}", resumed / f"read{FREE}"
    weights = load_file(free / "model" / "model.safetensors")
    observed = load_file(read / "model" / "model.safetensors")
    assert all(weights[name].equal(observed[name]) for name in weights)
    lines = metrics(read)
    assert [line["step"] for line in lines if line["event"] == "spectra"] == [1, 2, 3, 4, 5, 6]
    assert [line for line in lines if line["event"] != "spectra"] == metrics(free)


@pytest.mark.slow
@pytest.mark.parametrize("run_name", ["read3", "whole2"])
def test_the_last_reading_is_of_the_weights_that_are_exported(resumed, run_name):
    weights, logged = weights_and_log(resumed / run_name)
    start = load_file(resumed / "tiny" / "model.safetensors")
    means = []
    for layer, part in ((layer, part) for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")):
        name = f"model.layers.{layer}.{part}"
        w0, weight = (one[f"{name}.weight"].double() for one in (start, weights))
        means.append(float((weight - w0).norm() / w0.norm()))
        assert logged[6][f"spectra/{name}/relative_drift"] == pytest.approx(means[-1], rel=1e-5)
        ratio = torch.linalg.matrix_norm(weight, 2) / torch.linalg.matrix_norm(w0, 2)
        assert logged[6][f"spectra/{name}/spectral_norm_ratio"] == pytest.approx(float(ratio), rel=1e-5)
    assert min(means) < logged[6]["spectra/mean/relative_drift"] < 2 * max(means)


def test_wrong_layer_name_is_refused(tmp_path):
    config = write_job(
        tmp_path, penalties=[], weight_penalties=[{"name": "row_stretch", "target_modules": ["nowhere"]}]
    )
    ended = run([sys.executable, "-m", "calibtrain.launchers.train", str(config)], tmp_path)
    assert ended.code == 2, ended.output[-3000:]
    assert "weight_penalties.row_stretch.target_modules" in ended.output

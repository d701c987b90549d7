"""Moments in eight bits: the steps are those of bitsandbytes' own optimiser, however ZeRO has cut what it is handed."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.training.engine import schedule_factor
from tests.distributed.gradient_cases import EIGHT_BIT_CASES
from tests.distributed.gradient_runs import build, config_of, trained
from tests.distributed.jobs import trained as trained_jobs
from tests.distributed.jobs import write_job
from tests.distributed.ranks import run, torchrun
from tests.distributed.test_gradients import error
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.peer]
bitsandbytes = pytest.importorskip("bitsandbytes", reason="keeps moments in eight bits")

WIDE = {"tied": False, "hidden": 64}
LARGE = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
"""Of 4096 elements or more; keys and values are projected by 32 rows."""
STAGES = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight_bit")
    write_tiny_model(folder / "wide", **WIDE)
    script = str(__file__).replace("test_eight_bit", "gradient_runs")
    ended = run(torchrun(2, script, str(folder), ",".join(EIGHT_BIT_CASES)), folder)
    assert ended.code == 0, ended.output[-6000:]
    return folder, {name: torch.load(folder / f"{name}-2.pt", weights_only=True) for name in EIGHT_BIT_CASES}


def in_eight_bits(name):
    if ".lora_" in name:  # of rank 32: a side of 128
        lora_a = ".lora_A" in name
        return ("down_proj" if lora_a else "gate_proj") in name or (not lora_a and "up_proj" in name)
    return any(one in name for one in LARGE)


def steps_by_the_library(found, start, config):
    """Weights after the steps of bitsandbytes' AdamW over every flat tensor, with the gradients that `found` recorded."""
    training, ended = config.training, {name: one.clone().float() for name, one in start.items()}
    for held in found["layout"]:
        names = {name for name, *_ in held["parts"]}
        if not names:
            continue
        (bits,) = {8 if in_eight_bits(name) else 32 for name in names}
        assert held["bits"] == bits
        assert ("absmax1" in held["keys"]) == (bits == 8)
        decays = {start[name].ndim > 1 and not name.startswith("confidence_head") for name in names}
        (of_head,) = {name.startswith("confidence_head") for name in names}
        flat = torch.nn.Parameter(cut(held, start))
        kind = bitsandbytes.optim.AdamW8bit if bits == 8 else bitsandbytes.optim.AdamW32bit
        optimizer = kind(
            [flat],
            betas=training.adam_betas,
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay * decays.pop(),
            min_8bit_size=0 if bits == 8 else 2**40,
        )
        assert not decays
        peak = 3e-3 if of_head else training.learning_rate
        for step, gradients in enumerate(found["gradients"]):
            optimizer.param_groups[0]["lr"] = peak * schedule_factor(step, 3, training)
            clip = min(1.0, training.max_grad_norm / found["norms"][step])
            flat.grad = cut(held, gradients) * clip
            optimizer.step()
        for name, first, offset, size in held["parts"]:
            ended[name].view(-1)[first : first + size] = flat.detach()[offset : offset + size]
    return ended


def cut(held, tensors):
    flat = torch.zeros(held["size"])
    for name, first, offset, size in held["parts"]:
        flat[offset : offset + size] = tensors[name].float().view(-1)[first : first + size]
    return flat


@pytest.mark.parametrize("name", [name for name in EIGHT_BIT_CASES if "none" not in name])
def test_the_steps_are_those_of_the_library(results, name):
    folder, found = results[0], results[1][name]
    config = config_of(EIGHT_BIT_CASES[name], folder / "wide")
    start = {key: one.detach() for key, one in trained(build(config)) if one.requires_grad}
    assert start.keys() == found["gradients"][0].keys()
    assert {bits["bits"] for bits in found["layout"]} == {8, 32}
    expected = steps_by_the_library(found, start, config)
    own = {key: found["weights"][key.removeprefix("confidence_head.")] for key in start}
    if config.model.dtype == "bf16":
        expected = {key: one.bfloat16() for key, one in expected.items()}
    moved = error({key: one.float() for key, one in start.items()}, expected)
    assert moved > 1e-2
    assert error(own, expected) < 1e-6 * moved


@pytest.mark.parametrize("stage", range(4))
def test_the_trajectory_is_nearly_that_of_32_bits(results, stage):
    found = results[1]
    expected = found["eight_bit_none_stage0"]["weights"]
    start = build(config_of(EIGHT_BIT_CASES["eight_bit_stage0"], results[0] / "wide"))
    began = {key.removeprefix("confidence_head."): one.detach() for key, one in trained(start)}
    moved = error(began, expected)
    assert 0 < error(found[f"eight_bit_stage{stage}"]["weights"], expected) < 0.05 * moved


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole jobs of two ranks, and what they end with when they go on from their second checkpoint."""
    folder = tmp_path_factory.mktemp("jobs")
    write_tiny_model(folder / "wide", **WIDE)
    configs = [
        write_job(
            folder,
            f"stage{stage}",
            model={"source": str(folder / "wide")},
            training={"optimizer": "adamw_8bit", "zero_stage": stage, "keep_checkpoints": 9},
        )
        for stage in STAGES
    ]
    ended = run(trained_jobs(2, *configs), folder)
    assert ended.code == 0, ended.output[-6000:]
    for stage in STAGES:
        output = folder / f"stage{stage}"
        (output / "model").rename(folder / f"model{stage}")
        shutil.rmtree(output / "checkpoints" / "step-0000006")
    ended = run([*trained_jobs(2, *configs), "training.resume=auto"], folder)
    assert ended.code == 0, ended.output[-6000:]
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_bit_for_bit(runs, stage):
    expected = load_file(runs / f"model{stage}" / "model.safetensors")
    found = load_file(runs / f"stage{stage}" / "model" / "model.safetensors")
    start = load_file(runs / "wide" / "model.safetensors")
    assert found.keys() == expected.keys() == start.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert not any(found[name].equal(start[name]) for name in start)
    engine = runs / f"stage{stage}" / "checkpoints" / "step-0000004" / "engine"
    held = sum(path.stat().st_size for path in engine.glob("*.safetensors"))
    elements = {
        large: sum(one.numel() for name, one in start.items() if in_eight_bits(name) == large) for large in (0, 1)
    }
    assert held < 12 * elements[0] + (4 + 2 * (1 + 4 / 256)) * elements[1] + 2**16  # names, and tables of codes


def test_another_layout_is_told_in_one_line(runs):
    written = runs / "stage2" / "checkpoints" / "step-0000004"
    alone = [f"training.resume={written}", f"output_dir={runs / 'alone'}"]
    ended = run([sys.executable, "-m", "calibtrain.cli", "train", str(runs / "stage2.yaml"), *alone], runs)
    assert ended.code == 2, ended.output[-3000:]
    assert "holds moments of AdamW8bit that cannot be cut anew for other ranks" in ended.output
    assert "go on with as many processes as wrote it, and at training.zero_stage: 2" in ended.output
    assert "Traceback" not in ended.output

"""Moments in eight bits: whose they are, how parameters are grouped, and what is said where they cannot be had."""

import importlib.metadata

import pytest
import torch
from torch import nn

from calibtrain.config import RunConfig, TrainingConfig
from calibtrain.errors import UserError
from calibtrain.training import eight_bit
from calibtrain.training.deepspeed_config import deepspeed_dict
from calibtrain.training.eight_bit import MOMENT_BYTES, in_eight_bits, in_short_groups, require_eight_bit
from calibtrain.training.engine import optimizer_groups
from tests.tiny import tiny_model

EIGHT = TrainingConfig(optimizer="adamw_8bit")


@pytest.mark.parametrize("tied", [True, False])
def test_large_matrices_but_no_embeddings(tied):
    model = tiny_model(tied=tied, hidden=64)
    model.score = nn.Linear(8192, 1)
    model.frozen = nn.Linear(64, 64).requires_grad_(False)
    found = in_eight_bits(model)
    names = {name.rpartition(".weight")[0].rpartition(".")[2] for name, one in model.named_parameters() if one in found}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} | (set() if tied else {"lm_head"})
    assert len(found) == 2 * 5 + (not tied)
    assert MOMENT_BYTES == 2 + 2 * 4 / 256


def test_they_have_groups_of_their_own():
    model = tiny_model(tied=False, hidden=64)
    model.confidence_head = nn.Linear(128, 64)
    config = {"training": {"weight_decay": 0.1}, "confidence_head": {"learning_rate": 2e-4}}
    plain, packed = (
        optimizer_groups(
            model, RunConfig.model_validate({**config, "training": {**config["training"], "optimizer": optimizer}})
        )
        for optimizer in ("adamw", "adamw_8bit")
    )
    assert {group["bits"] for group in plain} == {32}
    (large,) = (group for group in packed if group["bits"] == 8)
    assert set(large["params"]) == in_eight_bits(model)
    assert large["weight_decay"] == 0.1
    head = [group for group in packed if model.confidence_head.weight in set(group["params"])]
    assert [(group["bits"], group["lr"], group["rate_scale"]) for group in head] == [(32, 2e-4, 10.0)]
    assert sum(len(group["params"]) for group in packed) == len(list(model.parameters()))


def test_no_group_is_longer_than_the_library_counts(monkeypatch):
    monkeypatch.setattr(eight_bit, "LONGEST", 10)
    monkeypatch.setattr(eight_bit, "COUNTED", 20)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (4, 6, 1, 12, 3)]
    found = in_short_groups([{"params": parameters, "bits": 8}], 1)
    assert [[one.numel() for one in group["params"]] for group in found] == [[4, 6], [1], [12], [3]]
    assert {group["bits"] for group in found} == {8}
    long = [{"params": [nn.Parameter(torch.zeros(30))], "bits": 8}]
    assert len(in_short_groups(long, 2)) == 1
    with pytest.raises(UserError, match=r"counts at most 20 elements, and a parameter has 30 .* take adamw, or more"):
        in_short_groups(long, 1)


@pytest.mark.parametrize(
    ("found", "words"), [("", "or newer: run"), ("0.49.2", r"or newer, and 0\.49\.2 is installed")]
)
def test_a_missing_package_is_told(monkeypatch, found, words):
    def version(name):
        if not found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=rf"adamw_8bit needs bitsandbytes 0\.50 {words}.*calibtrain\[adamw_8bit\]"):
        require_eight_bit(EIGHT)
    require_eight_bit(TrainingConfig())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.50.0.dev1")
    require_eight_bit(EIGHT)


def test_zero_is_told_to_take_it():
    config = RunConfig.model_validate({"model": {"dtype": "bf16"}, "training": {"optimizer": "adamw_8bit"}})
    assert deepspeed_dict(config, 2)["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in deepspeed_dict(RunConfig(), 2)

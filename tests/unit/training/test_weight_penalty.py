"""Weight penalties that hold nothing: no layer of that name, none that is trained, none that moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.losses.rotation_step import DecoupledPenalty, DenseMatrix
from calibtrain.losses.silence import PATIENCE
from calibtrain.training.matrices import trained_layers
from calibtrain.training.weight_penalty import WeightPenalties, penalised_layers
from tests.tiny import tiny_model


def penalty_on(targets):
    section = {"name": "row_stretch", "target_modules": targets}
    return RunConfig.model_validate({"weight_penalties": [section], "objective": {"name": "sft"}}).weight_penalties[0]


@pytest.mark.parametrize(
    ("layers", "targets", "cause"),
    [
        (
            ["q_proj", "k_proj"],
            ["q_proj", "v_pro"],
            "no trained linear layer is called v_pro; there are k_proj, q_proj",
        ),
        ([], ["q_proj"], "is called q_proj; the run trains no linear layer"),
        ([], "all-linear", "target_modules: the run trains no linear layer"),
    ],
)
def test_target_modules_that_are_not_there(layers, targets, cause):
    named = [(f"model.{name}", nn.Linear(2, 2)) for name in layers]
    with pytest.raises(UserError, match=cause):
        penalised_layers(named, penalty_on(targets))
    if layers:
        assert len(penalised_layers(named, penalty_on("all-linear"))) == len(layers)
        assert [name for name, _ in penalised_layers(named, penalty_on(["q_proj"]))] == ["model.q_proj"]


def test_frozen_adapters_are_no_layers():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert len(trained_layers(model.get_base_model())) == 4
    for name, parameter in model.named_parameters():
        if "v_proj" in name:
            parameter.requires_grad_(False)
    assert [name.rpartition(".")[2] for name, _ in trained_layers(model.get_base_model())] == ["q_proj"] * 2


def test_adapters_of_embeddings_are_no_linear_layers():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(tied=False), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    assert [name.rpartition(".")[2] for name, _ in trained_layers(model.get_base_model())] == ["q_proj"] * 2


@pytest.mark.parametrize("moves", [False, True])
def test_weights_that_never_move_are_told_of_once(moves, caplog):
    weight = nn.Parameter(torch.eye(4))
    penalties = {
        "row_stretch": DecoupledPenalty("row_stretch", 1.0, [DenseMatrix.of("row_stretch", weight)]),
        "angle_budget": DecoupledPenalty("angle_budget", 1.0, [DenseMatrix.of("angle_budget", weight)], budget=9.0),
    }
    optimizer = torch.optim.SGD([weight], lr=0.1 if moves else 0.0)
    held = WeightPenalties(penalties, optimizer)
    for step in range(2 * PATIENCE):
        weight.grad = torch.ones_like(weight)
        held.arm(step)
        optimizer.step()
    told = ["weight_penalties.row_stretch has been exactly 0 for 20 steps"] * (not moves)
    assert [one.message.partition(":")[0] for one in caplog.records] == told

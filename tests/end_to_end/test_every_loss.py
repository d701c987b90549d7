"""`calibtrain train` reaches every loss by its name: each trains a tiny model for two steps, from a YAML file."""

from __future__ import annotations

import inspect
import json
import os
import sys
from typing import get_args

import pytest
import torch
import yaml

from calibtrain.config_file import load_config
from calibtrain.config_losses import Objective, OwnAnswersConfig, Penalty, WeightPenaltyConfig
from calibtrain.errors import UserError
from calibtrain.losses import CATALOG, OBJECTIVES, PENALTIES
from calibtrain.training.losses import TOKENS
from tests.distributed.jobs import metrics, write_job

OBJECTIVE_SECTIONS, PENALTY_SECTIONS = (
    {section.model_fields["name"].default: section for section in get_args(get_args(union)[0])}
    for union in (Objective, Penalty)
)
WEIGHT_PENALTIES = get_args(WeightPenaltyConfig.model_fields["name"].annotation)
ROLLOUTS = ("grpo", "rloo", "ppo")
MINE = """
import torch
from calibtrain.losses import LossTerm

class Mine(torch.nn.Module):
    name = "mine"
    def __init__(self, *, factor=1.0):
        super().__init__()
        self.factor = factor
    def counts(self, batch):
        return {"mine": batch.is_completion.sum()}
    def forward(self, stats, batch):
        return {"mine": LossTerm(-self.factor * stats.logprob.sum(), batch.is_completion.sum())}

class Nameless(torch.nn.Module):
    pass
"""
REQUIRED = {
    "label_smoothing": {"tokens": ["India", "city", "it"]},
    "custom": {"loss": "mine_for_tests:Mine", "arguments": {"factor": 2.0}},
    "refusal": {"relabel_every": 1},
    "correctness_query": {"choices": ["In", "of"]},
    "grpo": {"beta": 0.1},
    "reward_model": {"confidence_statements": "added"},  # with PPO-M's pairs
}
ANSWERING = {"refresh_every": 1, "questions_per_refresh": 6, "answers_per_step": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = tmp_path_factory.mktemp("every_loss")
    (folder / "mine_for_tests.py").write_text(MINE)
    return folder


def job(folder, name, **sections):
    splits = {"train": 12, "calibration": 6, "temperature": 0, "certification": 0, "test": 0}
    training = {
        "max_steps": 2,
        "checkpoint_every": None,
        "zero_stage": 1,
        "global_batch_size": 2,
        "learning_rate": 1e-2,
    }
    config = {
        "penalties": [],
        "data": {"splits": splits},
        "training": training,
        "rollouts": {"group_size": 2},
        "evaluation": {"max_new_tokens": 2},
        **sections,
    }
    rollouts = config.pop("rollouts")
    weight_penalties = config.pop("weight_penalties", [])
    path = write_job(folder, name, **config)
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "rollouts": rollouts, "weight_penalties": weight_penalties}))
    return path


def trained(folder, monkeypatch, name, **sections):
    """Train; returns the lines of metrics.jsonl and the exported weights."""
    from safetensors.torch import load_file

    from calibtrain.pipeline import train

    monkeypatch.chdir(folder)
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(folder / "cache"))
    output = train.run(load_config(job(folder, name, **sections)))
    return metrics(folder / name), load_file(output / "model.safetensors")


def assert_trained(folder, lines, weights):
    from safetensors.torch import load_file

    logs = [line for line in lines if line["event"] == "log"]
    assert [line["step"] for line in logs] == [1, 2]
    numbers = {key: value for line in logs for key, value in line.items() if key.startswith("train/loss/")}
    assert numbers
    start = load_file(folder / "tiny" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    moved = [name for name, tensor in start.items() if (name in weights and weights[name].shape != tensor.shape)
             or (name in weights and not torch.equal(weights[name], tensor))]  # fmt: skip
    assert moved
    return numbers


@pytest.mark.parametrize("name", OBJECTIVE_SECTIONS)
def test_objective(folder, monkeypatch, name):
    section = {"name": name, **REQUIRED.get(name, {})}
    lines, weights = trained(folder, monkeypatch, f"objective_{name}", objective=section)
    numbers = assert_trained(folder, lines, weights)
    if name == "idk":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = folder / "objective_idk" / "model"
        token = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("[IDK]")
        rows = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.shape[0]
        assert rows == token + 1
    if name == "refusal":
        assert numbers.keys() <= {"train/loss/nll_known", "train/loss/nll_refusal"}


@pytest.mark.parametrize("name", PENALTY_SECTIONS)
def test_penalty(folder, monkeypatch, name):
    section = {"name": name, **REQUIRED.get(name, {})}
    if issubclass(PENALTY_SECTIONS[name], OwnAnswersConfig):
        section |= ANSWERING
    if name == "answer_score":
        section["moves"] = "all"
    if name == "tokenized_brier":
        section["levels"] = ["is", "it", "of"]
    lines, weights = trained(folder, monkeypatch, f"penalty_{name}", penalties=[section])
    numbers = assert_trained(folder, lines, weights)
    assert f"train/loss/{'mine' if name == 'custom' else name}" in numbers


@pytest.mark.parametrize("name", WEIGHT_PENALTIES)
def test_weight_penalty(folder, monkeypatch, name):
    section = {"name": name, "layer_fraction": 1.0}
    lines, weights = trained(folder, monkeypatch, f"weight_{name}", weight_penalties=[section])
    assert_trained(folder, lines, weights)
    assert f"train/weight_penalty/{name}" in json.dumps(lines)


def test_every_loss_of_the_catalogue_has_a_section():
    def named(kind):
        return {entry.name for entry in CATALOG if entry.kind == kind}

    assert named("objective") == OBJECTIVES.keys() == OBJECTIVE_SECTIONS.keys() - {"custom"}
    assert named("penalty") == PENALTIES.keys() == PENALTY_SECTIONS.keys() - {"custom"}
    assert named("weight penalty") == set(WEIGHT_PENALTIES)


@pytest.mark.parametrize(("losses", "sections"), [(OBJECTIVES, OBJECTIVE_SECTIONS), (PENALTIES, PENALTY_SECTIONS)])
def test_a_section_has_its_losss_arguments_and_defaults(losses, sections):
    for name, loss in losses.items():
        fields = sections[name].model_fields
        for argument, parameter in inspect.signature(loss).parameters.items():
            if argument == "token_set":
                assert TOKENS[name] in fields
                continue
            assert fields[argument].default == parameter.default, f"{name}.{argument}"


PROBLEMS = {
    "no_such_module_here:Loss": "working directory",
    "mine_for_tests:Their": "has no torch.nn.Module Their",
    "mine_for_tests:Nameless": "has a `name`",
    "json:JSONDecoder": "has no torch.nn.Module",
}


@pytest.mark.parametrize("path", PROBLEMS)
def test_a_loss_of_ones_own_that_is_none(folder, monkeypatch, path):
    from calibtrain.training.losses import import_loss

    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=PROBLEMS[path]):
        import_loss(path, {})
    with pytest.raises(UserError, match="unexpected keyword"):
        import_loss("mine_for_tests:Mine", {"factr": 1})


def test_ones_own_loss_is_imported_only_when_the_config_names_it(folder, monkeypatch):
    from calibtrain.training.losses import term_names

    monkeypatch.chdir(folder)
    sys.modules.pop("mine_for_tests", None)
    assert term_names(load_config(job(folder, "plain"))) == ["nll"]
    assert "mine_for_tests" not in sys.modules
    own = {"name": "custom", "loss": "mine_for_tests:Mine"}
    config = load_config(job(folder, "own", penalties=[own]))
    assert "mine_for_tests" not in sys.modules
    assert term_names(config) == ["mine", "nll"]
    with pytest.raises(UserError, match=r"penalties\.0\.loss"):
        load_config(job(folder, "bad", penalties=[{**own, "loss": "os.system('x'):y"}]))


def test_two_losses_with_one_term_are_refused(folder, monkeypatch):
    own = {"name": "custom", "loss": "mine_for_tests:Mine"}
    with pytest.raises(UserError, match="a term called mine"):
        trained(folder, monkeypatch, "twice", objective=own, penalties=[own])

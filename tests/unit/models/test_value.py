"""A value model beside the policy: where it starts, what of it learns, and that it leaves the policy alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.errors import UserError
from calibtrain.losses.reward_model import RewardModelLoss
from calibtrain.losses.terms import ANSWER
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import LogprobStep
from calibtrain.models.policy import Policy
from calibtrain.models.reward import RewardLossModel, export_reward_model
from calibtrain.models.value import check_value_source, load_value_model
from calibtrain.pipeline.train import build_model
from calibtrain.training.engine import Engine, optimizer_groups
from tests.tiny import tiny_tokenizer, write_tiny_model

ENCODED = [Encoded((20, 21, 22, 23, 1), 2, ANSWER, 0), Encoded((20, 21, 30, 1), 2, ANSWER, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("value")
    write_tiny_model(path / "tied")
    write_tiny_model(path / "untied", tied=False)
    return path


def config(source, model=None, **keys):
    return RunConfig.model_validate(
        {
            "model": {"source": str(source), "dtype": "fp32", **(model or {})},
            "objective": {"name": "ppo", "value_model": "own", **keys},
        }
    )


def reward_model(folder):
    """Exports a reward model of the tiny one; returns its directory and the head."""
    settings = config(folder / "tied").model
    torch.manual_seed(4)
    model = RewardLossModel(Policy(load_model(settings)), RewardModelLoss(), seed=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = load_tokenizer(settings)
    target = folder / "reward"
    export_reward_model(model.policy, model.score, settings, tokenizer, tokenizer.eos_token_id, target)
    return target


@pytest.mark.parametrize("source", ["tied", "untied"])
def test_values_are_those_of_the_second_backbone(folder, source):
    model = build_model(config(folder / source))
    batch = collate(ENCODED, 2)
    values = model(LogprobStep(batch))[1]
    backbone, head = model.value.model.base_model, model.value.score
    for one, found in zip(ENCODED, values.split([3, 2]), strict=True):
        hidden = backbone(input_ids=torch.tensor([one.ids])).last_hidden_state[0]
        torch.testing.assert_close(found, head(hidden[1:-1])[:, 0].detach(), rtol=1e-5, atol=1e-6)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        model(LogprobStep(collate(ENCODED, 2, shared_prefix=True)))[1], values, rtol=1e-4, atol=1e-5
    )
    whole = model(LogprobStep(batch, after=True))[1]
    hidden = backbone(input_ids=torch.tensor([ENCODED[1].ids])).last_hidden_state[0]
    torch.testing.assert_close(whole[:5], values)
    torch.testing.assert_close(whole[6], head(hidden[-1:])[0, 0].detach(), rtol=1e-5, atol=1e-6)
    # It begins as the policy is, and shares nothing with it.
    names = dict(model.value.model.named_parameters())
    for name, parameter in model.policy.model.named_parameters():
        if not name.startswith("lm_head"):
            assert names[name].equal(parameter)
            assert names[name] is not parameter
    assert not any(name.startswith("lm_head") for name in names)


def test_its_loss_does_not_move_the_policy(folder):
    model = build_model(config(folder / "tied"))
    batch = collate(ENCODED, 2)
    hidden = model.policy.hidden_at_targets(batch)
    model.scored(hidden, batch).scores.sum().backward()
    assert all(parameter.grad is None for parameter in model.policy.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.value.score.parameters())
    assert sum(float(one.grad.abs().sum()) for one in model.value.model.parameters() if one.grad is not None) > 0


def test_with_lora_adapters_of_its_own_are_trained_and_the_head(folder):
    model = build_model(config(folder / "tied", {"lora": {"r": 2}}))
    trained = {name for name, one in model.value.named_parameters() if one.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"})
    assert len(trained) > 1
    batch = collate(ENCODED, 2)
    start = model(LogprobStep(batch))
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    moved = model(LogprobStep(batch))
    assert not moved[0].equal(start[0])
    assert moved[1].equal(start[1])


def test_it_starts_from_a_reward_model_with_its_head(folder):
    from transformers import AutoModelForSequenceClassification

    source = reward_model(folder)
    value = load_value_model(config(folder / "tied", value_source=str(source)))
    classifier = AutoModelForSequenceClassification.from_pretrained(source)
    ids = torch.tensor([ENCODED[0].ids])
    expected = classifier(input_ids=ids).logits[0, 0]
    hidden = value.model.base_model(input_ids=ids).last_hidden_state[0, -1:]
    torch.testing.assert_close(value.score(hidden)[0, 0], expected, rtol=1e-4, atol=1e-5)
    check_value_source(config(folder / "tied", value_source=str(source)), load_tokenizer(config(folder / "tied").model))


def test_sources_that_cannot_be_values_are_refused(folder, tmp_path):
    run = config(folder / "tied", value_source=str(tmp_path / "none"))
    tokenizer = load_tokenizer(run.model)
    with pytest.raises(UserError, match=r"objective\.value_source.*no such directory"):
        check_value_source(run, tokenizer)
    write_tiny_model(tmp_path / "other")
    tiny_tokenizer(vocab_size=380).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="numbers tokens otherwise"):
        check_value_source(config(folder / "tied", value_source=str(tmp_path / "other")), tokenizer)
    with pytest.raises(ValueError, match="value_model: own"):
        RunConfig.model_validate({"objective": {"name": "ppo", "value_source": "out/model"}})


def test_it_may_learn_at_a_rate_of_its_own(folder):
    run = config(folder / "untied", value_learning_rate=3e-4)
    model = build_model(run)
    groups = optimizer_groups(model, run)
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    assert len(rates) == sum(one.requires_grad for one in model.parameters())
    assert all(rates[id(one)] == pytest.approx(3e-4) for one in model.value.parameters())
    assert {rates[id(one)] for one in model.policy.parameters()} == {run.training.learning_rate}
    started = Engine(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 0, False)
    rate = started.set_learning_rate(50, 100, run.training)
    factors = sorted({group["lr"] / rate for group in groups})
    assert factors == pytest.approx([1.0, 3e-4 / run.training.learning_rate])

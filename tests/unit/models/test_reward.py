"""A reward model's scores are those of the sequence classifier it is exported as, in every layout of the batch."""

from __future__ import annotations

import pytest
import torch

from calibtrain.config import ModelConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.errors import UserError
from calibtrain.losses import RewardModelLoss
from calibtrain.losses.policy_gradient import GRPOLoss
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import LogprobStep, LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.models.reward import (
    RewardLossModel,
    ValueLossModel,
    export_reward_model,
    last_positions,
    padding_token,
    scalar_head,
)
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_model

END = 1


def sequences(count=3):
    """Pairs of unequal lengths; the last token is the end token."""
    found = []
    for pair in range(count):
        prompt = tuple(range(20, 24 + pair))
        for role, length in ((CHOSEN, 2 + pair), (REJECTED, 5 - pair)):
            completion = tuple(range(40 + 10 * role, 40 + 10 * role + length))
            found.append(Encoded((*prompt, *completion, END), len(prompt), role, pair, pair_id=pair))
    return found


def step(batch, model):
    return TrainStep(batch, {name: torch.tensor(float(max(n, 1))) for name, n in model.counts(batch).items()})


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def reward_model(request):
    torch.manual_seed(0)
    return RewardLossModel(Policy(tiny_model(tied=request.param)), RewardModelLoss(), seed=3)


@pytest.mark.parametrize("packing", [None, 64])
def test_score_is_that_of_the_last_token(reward_model, packing):
    encoded = sequences()
    batch = collate(encoded, 2, packing_tokens=packing)
    flat = batch.input_ids.flatten()
    assert flat[last_positions(batch)].tolist() == [END] * len(encoded)
    seen = []
    reward_model.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].scores.detach()))
    loss, output = reward_model(step(batch, reward_model))
    backbone = reward_model.policy.causal_model.base_model
    expected = torch.stack(
        [reward_model.score(backbone(input_ids=torch.tensor([one.ids])).last_hidden_state[0, -1])[0] for one in encoded]
    )
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)
    pairs = expected.view(-1, 2)
    wanted = -torch.nn.functional.logsigmoid(pairs[:, 0] - pairs[:, 1]).mean() + 0.01 * pairs.sum(1).square().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert not output.batch.is_completion.any()  # hooks measure no tokens of a model that predicts none
    loss.backward()
    assert reward_model.score.weight.grad.abs().sum() > 0
    head = reward_model.policy.causal_model.get_output_embeddings().weight
    embeddings = reward_model.policy.causal_model.get_input_embeddings().weight
    assert embeddings.grad.abs().sum() > 0
    assert head is embeddings or not head.requires_grad


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_export_loads_as_a_sequence_classifier(tmp_path, lora, pad_is_eos):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    write_tiny_model(tmp_path / "tiny", pad_is_eos=pad_is_eos)
    config = ModelConfig(source=str(tmp_path / "tiny"), dtype="fp32", lora=lora)
    model = RewardLossModel(Policy(load_model(config)), RewardModelLoss(), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "score.weight":
                parameter.normal_()
    tokenizer = load_tokenizer(config)
    export_reward_model(model.policy, model.score, config, tokenizer, tokenizer.eos_token_id, tmp_path / "out")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert classifier.config.num_labels == 1
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.pad_token_id == classifier.config.pad_token_id != tokenizer.eos_token_id

    end = tokenizer.eos_token_id
    encoded = [Encoded((30, 31, 32, 33, end), 2, CHOSEN, 0), Encoded((30, 31, 40, end), 2, REJECTED, 0)]
    seen = []
    model.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].scores.detach()))
    batch = collate(encoded, 2)
    model.eval()(step(batch, model))
    padded = loaded.pad({"input_ids": [list(one.ids) for one in encoded]}, return_tensors="pt")
    with torch.no_grad():
        theirs = classifier(**padded).logits[:, 0]
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-5)


def test_head_is_drawn_alike_on_every_rank():
    policy = tiny_model()
    torch.manual_seed(1)
    first = scalar_head(policy, 7).weight
    torch.manual_seed(2)
    assert scalar_head(policy, 7).weight.equal(first)
    assert not scalar_head(policy, 8).weight.equal(first)


def test_padding_is_never_the_end_token():
    assert padding_token(tiny_tokenizer(), END) == "<|pad|>"
    assert padding_token(tiny_tokenizer(pad_is_eos=True), END) == "<|bos|>"
    alone = tiny_tokenizer(pad_is_eos=True)
    alone.bos_token = alone.eos_token
    with pytest.raises(UserError, match="add a pad token"):
        padding_token(alone, END)


def test_values_are_read_where_tokens_are_predicted():
    torch.manual_seed(0)
    model = ValueLossModel(Policy(tiny_model()), GRPOLoss(), seed=3)
    encoded = [Encoded((20, 21, 22, 23, END), 2, ANSWER, 0), Encoded((20, 21, 30, END), 2, ANSWER, 0)]
    for shared in (False, True):
        logprob, values = model(LogprobStep(collate(encoded, 2, shared_prefix=shared)))
        hidden = model.policy.causal_model.base_model(input_ids=torch.tensor([encoded[0].ids])).last_hidden_state[0]
        torch.testing.assert_close(values[:3], model.score(hidden[1:4])[:, 0].detach(), rtol=1e-5, atol=1e-6)
        assert logprob.shape == values.shape == (5,)
        assert not values.requires_grad
    assert LossModel(model.policy)(LogprobStep(collate(encoded, 2)))[1] is None


def test_reference_is_the_model_without_its_adapters(tmp_path):
    write_tiny_model(tmp_path / "tiny")
    config = ModelConfig(source=str(tmp_path / "tiny"), dtype="fp32", lora={"r": 2})
    model = LossModel(Policy(load_model(config)))
    batch = collate([Encoded((20, 21, 22, 23, END), 2, ANSWER, 0)], 2)
    start = model(LogprobStep(batch))[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (model(LogprobStep(batch))[0] - start).abs().max() > 1e-3
    assert model(LogprobStep(batch, base=True))[0].equal(start)


def test_bf16_scores_are_made_and_kept_in_float32():
    """In bf16 about a thousand of 2,000 scores are different numbers; in float32 nearly all are."""
    head = scalar_head(tiny_model().bfloat16(), seed=0)
    hidden = torch.randn(2000, head.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(hidden)[:, 0]
    exact = (hidden.double() @ head.weight.double().t())[:, 0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)
    assert exact.bfloat16().unique().numel() < 1400
    assert scores.unique().numel() > 1900


def test_a_bf16_reward_model_is_loaded_in_float32_from_files_of_its_own_size(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    write_tiny_model(tmp_path / "tiny")
    config = ModelConfig(source=str(tmp_path / "tiny"), dtype="bf16")
    model = RewardLossModel(Policy(load_model(config)), RewardModelLoss(), seed=1)
    tokenizer = load_tokenizer(config)
    export_reward_model(model.policy, model.score, config, tokenizer, tokenizer.eos_token_id, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 402).view(200, 2) % 60 + 2
    with torch.no_grad():
        scores = classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert scores.dtype == torch.float32
    assert torch.equal(classifier.score.weight, model.score.weight.float())

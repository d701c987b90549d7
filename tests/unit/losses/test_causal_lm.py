"""From a collator's batch with labels to the statistics of its targets: which tokens, which sequence, which numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from calibtrain.errors import UserError
from calibtrain.losses import (
    CHOSEN,
    REJECTED,
    IDKLoss,
    LabelSmoothingLoss,
    ORPOLoss,
    SFTLoss,
    batch_from_labels,
    causal_lm_loss,
    global_counts,
    loss_terms_from_model,
    mean_loss,
    normalized_loss,
    token_stats_from_hidden,
    token_stats_from_model,
)
from calibtrain.ops import TokenStats
from tests.tiny import tiny_model

LENGTHS = ((9, 3), (5, 2), (7, 6))  # of each row: tokens, and how many of them are the prompt


def rows(vocabulary=400, padding_side="right"):
    """A padded batch as a Hugging Face collator makes it."""
    generator = torch.Generator().manual_seed(0)
    width = max(length for length, _ in LENGTHS)
    input_ids = torch.full((len(LENGTHS), width), 2)
    labels = torch.full_like(input_ids, -100)
    mask = torch.zeros_like(input_ids)
    for row, (length, prompt) in enumerate(LENGTHS):
        start = width - length if padding_side == "left" else 0
        input_ids[row, start : start + length] = torch.randint(3, vocabulary, (length,), generator=generator)
        labels[row, start + prompt : start + length] = input_ids[row, start + prompt : start + length]
        mask[row, start : start + length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(one, other, tolerance=1e-5):
    for name, gradient in gradients(one).items():
        expected = gradients(other)[name]
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, atol=tolerance * scale, rtol=0.0, msg=name)


def test_targets_and_their_sequences_by_hand():
    batch = batch_from_labels(**rows())
    inputs = rows()
    expected = [(row, at) for row, (length, prompt) in enumerate(LENGTHS) for at in range(max(1, prompt), length)]
    assert batch.targets.tolist() == [inputs["input_ids"][row, at].item() for row, at in expected]
    assert batch.target_positions.tolist() == [row * 9 + at - 1 for row, at in expected]
    assert batch.sequence_ids.tolist() == [row for row, _ in expected]
    assert batch.segment_ids.tolist() == inputs["attention_mask"].tolist()
    assert batch.is_completion.all()
    assert batch.roles.tolist() == [CHOSEN] * 3
    assert batch.correct.isnan().all()
    assert not batch.packed


def test_the_first_token_is_never_a_target_and_rows_without_labels_are_empty_sequences():
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    batch = batch_from_labels(input_ids, torch.stack([input_ids[0], torch.full((3,), -100)]))
    assert batch.targets.tolist() == [6, 7]
    assert batch.roles.shape == (2,)
    empty = batch_from_labels(input_ids, torch.full_like(input_ids, -100))
    assert empty.targets.shape == (0,)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_model_itself(padding_side, tied):
    ours, theirs = tiny_model(tied=tied), tiny_model(tied=tied)
    inputs = rows(padding_side=padding_side)
    loss = causal_lm_loss(ours, SFTLoss(), **inputs)
    expected = theirs(**inputs).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)
    assert "forward" not in ours.lm_head.__dict__
    assert not ours.lm_head._forward_hooks
    torch.testing.assert_close(ours(**inputs).loss, expected)  # the model is as it was


def test_every_statistic_is_that_of_the_models_logits():
    model, inputs = tiny_model(), rows()
    batch = batch_from_labels(**inputs)
    stats = token_stats_from_model(model, batch)
    logp = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten(0, 1)
    logp = logp[batch.target_positions].log_softmax(-1)
    torch.testing.assert_close(stats.logprob, logp.gather(1, batch.targets[:, None])[:, 0])
    torch.testing.assert_close(stats.entropy, -(logp.exp() * logp).sum(1))
    torch.testing.assert_close(stats.sum_p2, logp.exp().square().sum(1))
    torch.testing.assert_close(stats.confidence, logp.max(1).values.exp())
    assert stats.correct.tolist() == (logp.argmax(1) == batch.targets).tolist()


@pytest.mark.parametrize("make", [tiny_model, lambda: next(special_heads()), lambda: list(special_heads())[1]])
@pytest.mark.parametrize(
    "loss_of", [lambda ids: IDKLoss(token_set=ids[:1]), lambda ids: LabelSmoothingLoss(token_set=ids[:3], epsilon=0.3)]
)
def test_losses_that_read_a_token_set(make, loss_of):
    """Value and gradients are those of the loss on the model's own logits."""
    torch.manual_seed(0)
    ours, inputs = make().eval(), rows(vocabulary=64)
    ours.get_output_embeddings().weight.data.mul_(10.0)  # probabilities that are far apart
    theirs, batch = copy.deepcopy(ours), batch_from_labels(**inputs)
    loss = loss_of(batch.targets.tolist())
    value = causal_lm_loss(ours, loss, **inputs)
    logits = theirs(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten(0, 1)
    logp = logits[batch.target_positions].log_softmax(-1)
    stats, set_logprob = stats_of(logp, batch.targets), logp[:, loss.token_set]
    expected = mean_loss(loss(stats, batch, set_logprob))
    assert abs(expected - SFTLoss()(stats, batch)["nll"].total / len(batch.targets)) > 1e-3
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    value.backward()
    expected.backward()
    assert_same_gradients(ours, theirs, tolerance=1e-4)
    terms, found = loss_terms_from_model(ours, loss, batch)
    torch.testing.assert_close(mean_loss(terms), value)
    torch.testing.assert_close(found.logprob, stats.logprob, atol=1e-5, rtol=1e-5)


def stats_of(logp, targets):
    """TokenStats of log-probs (N, V)."""
    p, at_target = logp.exp(), logp.gather(1, targets[:, None])[:, 0]
    best = logp.max(1)
    return TokenStats(
        at_target, -(p * logp).sum(1), p.square().sum(1), best.values.exp().detach(), best.indices == targets
    )


def test_hidden_states_of_an_own_backbone():
    model, batch = tiny_model(), batch_from_labels(**rows())
    hidden = model.model(batch.input_ids, attention_mask=rows()["attention_mask"]).last_hidden_state
    stats = token_stats_from_hidden(hidden, model.lm_head.weight, batch)
    torch.testing.assert_close(stats.logprob, token_stats_from_model(model, batch).logprob)
    with pytest.raises(UserError, match="all positions"):
        token_stats_from_hidden(hidden[:, :-1], model.lm_head.weight, batch)


def test_packed_rows_give_the_padded_rows_numbers():
    inputs, model = rows(), tiny_model()
    kept = inputs["attention_mask"].bool()
    packed = batch_from_labels(
        inputs["input_ids"][kept][None],
        inputs["labels"][kept][None],
        position_ids=torch.cat([torch.arange(length) for length, _ in LENGTHS])[None],
    )
    padded = batch_from_labels(**inputs)
    for name in ("targets", "sequence_ids", "roles", "pair_ids"):
        assert getattr(packed, name).tolist() == getattr(padded, name).tolist()
    assert packed.packed
    stats = [token_stats_from_model(model, batch) for batch in (packed, padded)]
    torch.testing.assert_close(stats[0].logprob, stats[1].logprob, atol=1e-5, rtol=1e-5)


def test_packed_sequences_lose_the_label_that_the_one_before_would_predict():
    input_ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = batch_from_labels(input_ids, input_ids.clone(), position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    assert batch.targets.tolist() == [6, 8, 9]
    assert batch.sequence_ids.tolist() == [0, 1, 1]


def test_pairs_in_trl_s_layout():
    inputs = {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in rows().items()}
    batch = batch_from_labels(**inputs, pairs=True)
    assert batch.roles.tolist() == [CHOSEN] * 3 + [REJECTED] * 3
    assert batch.pair_ids.tolist() == [0, 1, 2, 0, 1, 2]
    terms = ORPOLoss()(token_stats_from_model(tiny_model(), batch), batch)
    assert terms["odds_ratio"].count == 3
    with pytest.raises(UserError, match="as many rejected"):
        batch_from_labels(**rows(), pairs=True)


def test_prompt_tokens_among_the_targets():
    inputs = rows()
    completion = inputs["labels"] != -100
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = batch_from_labels(inputs["input_ids"], labels, inputs["attention_mask"], completion_mask=completion)
    assert SFTLoss(nll_scope="full").counts(batch)["nll"] == sum(length - 1 for length, _ in LENGTHS)
    assert SFTLoss().counts(batch)["nll"] == sum(length - prompt for length, prompt in LENGTHS)


def test_micro_batches_over_global_counts_sum_to_the_whole():
    loss, model, inputs = SFTLoss(), tiny_model(), rows()
    parts = [{name: tensor[rows_] for name, tensor in inputs.items()} for rows_ in (slice(0, 1), slice(1, 3))]
    batches = [batch_from_labels(**part) for part in parts]
    counts = global_counts(loss, batches)
    whole = causal_lm_loss(model, loss, **inputs)
    shares = [normalized_loss(loss(token_stats_from_model(model, batch), batch), counts) for batch in batches]
    torch.testing.assert_close(sum(shares), whole)
    means = [mean_loss(loss(token_stats_from_model(model, batch), batch)) for batch in batches]
    assert abs(sum(means).item() / 2 - whole.item()) > 1e-4  # what the counts are for
    with pytest.raises(UserError, match="no batch"):
        global_counts(loss, [])


def special_heads():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    size = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    yield Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=3.0))
    yield CohereForCausalLM(CohereConfig(**size, logit_scale=0.25))
    yield GraniteForCausalLM(GraniteConfig(**size, logits_scaling=4.0))


def test_capped_and_scaled_logits():
    for model in special_heads():
        model.eval()
        inputs = rows(vocabulary=64)
        expected = model(**inputs).loss
        torch.testing.assert_close(causal_lm_loss(model, SFTLoss(), **inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_does_more_is_refused():
    class Shifted(type(tiny_model())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            ramp = torch.linspace(0, 2, output.logits.shape[-1])
            output.logits = output.logits + ramp
            return output

    model = tiny_model()
    model.__class__ = Shifted
    with pytest.raises(UserError, match="is not supported"):
        causal_lm_loss(model, SFTLoss(), **rows())
    model = tiny_model(tied=False)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="only a plain linear one"):
        causal_lm_loss(model, SFTLoss(), **rows())
    with pytest.raises(UserError, match="no Hugging Face causal language model"):
        causal_lm_loss(nn.Linear(2, 2), SFTLoss(), **rows())


def test_a_forward_that_does_not_call_its_head_is_refused():
    model = tiny_model()
    model.forward = lambda **inputs: None
    with pytest.raises(UserError, match="0 times"):
        causal_lm_loss(model, SFTLoss(), **rows())
    assert "forward" not in model.lm_head.__dict__


def test_autocast_multiplies_in_its_dtype():
    model, inputs = tiny_model(), rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = causal_lm_loss(model, SFTLoss(), **inputs)
        expected = model(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=2e-2, rtol=0.0)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_peft_adapters():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    other = copy.deepcopy(model)
    loss, expected = causal_lm_loss(model, SFTLoss(), **rows()), other(**rows()).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in trained:
        torch.testing.assert_close(gradients(model)[name], gradients(other)[name], atol=1e-6, rtol=1e-4)
    on_head = get_peft_model(tiny_model(tied=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="leave lm_head out"):
        causal_lm_loss(on_head, SFTLoss(), **rows())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros((3, 8), dtype=torch.int64)}, "input_ids and labels"),
        ({"labels": torch.zeros((3, 9))}, "int64"),
        ({"attention_mask": torch.ones((3, 8))}, "attention_mask must be"),
    ],
)
def test_shapes_that_do_not_fit(change, words):
    with pytest.raises(UserError, match=words):
        batch_from_labels(**{**rows(), **change})

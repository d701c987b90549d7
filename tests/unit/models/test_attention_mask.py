"""Packed and shared-prefix rows give each architecture's own log-probs and gradients, or are refused with the cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_mask, flex_attention

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.errors import UserError
from calibtrain.losses.orpo import ORPOLoss
from calibtrain.losses.terms import mean_loss
from calibtrain.models.attention_mask import attention_inputs, attention_mask, block_mask_obstacle, visibility
from calibtrain.models.policy import Policy
from calibtrain.training.row_layout import block_mask_failure, row_layout
from tests.flash import use_stand_in
from tests.tiny import tiny_model
from tests.unit.models.test_shared_prefix import sequences

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LONGEST = 11
"""Tokens of the longest of `sequences()`."""
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": LONGEST}),
    "gemma2": ("Gemma2", {"sliding_window": LONGEST, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2", {}),
}
OTHER_RULES = {
    "mistral": ("Mistral", {"sliding_window": LONGEST - 2}, "sliding_window"),
    "gemma2": ("Gemma2", {"sliding_window": LONGEST - 2, "query_pre_attn_scalar": 8}, "sliding_window"),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "sliding_window",
    ),
    "chunks": ("Llama", {"attention_chunk_size": 4}, "attention_chunk_size"),
    "other_layers": ("Llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
}
LAYOUTS = {
    "packed": {"packing_tokens": 24},
    "shared": {"shared_prefix": True},
    "packed_shared": {"packing_tokens": 24, "shared_prefix": True},
}


def model_of(architecture: str, settings: dict, attention: str = "sdpa"):
    """A random model in which a token of another sequence would show: large attention weights."""
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **settings})
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
    return model


def loss_and_gradient(model, **layout):
    """ORPO of the sequences, with their prompts among the targets, and its gradient as one vector."""
    policy, objective = Policy(model), ORPOLoss(nll_scope="full")
    model.zero_grad()
    batch = collate(sequences(), 0, "full", **layout)
    stats = policy.token_stats(policy.hidden_at_targets(batch), batch.targets)
    loss = mean_loss(objective(stats, batch)) + 0.1 * (stats.entropy.mean() + stats.sum_p2.mean())
    loss.backward()
    return loss.detach(), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_and_shared_rows_equal_sequences_alone(name: str, attention: str) -> None:
    if name == "gemma2" and attention == "sdpa":
        attention = "eager"  # SDPA leaves out its soft-capping
    model = model_of(*ARCHITECTURES[name], attention)
    assert block_mask_obstacle(model, LONGEST) is None
    loss, gradient = loss_and_gradient(model)
    for layout, options in LAYOUTS.items():
        batch = collate(sequences(), 0, "full", **options)
        assert batch.packed
        found, found_gradient = loss_and_gradient(model, **options)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6, msg=layout)
        assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm(), layout
    assert block_mask_failure(Policy(model)) is None


BY_LENGTH = {
    **ARCHITECTURES,
    "mistral": ("Mistral", {"sliding_window": 4}),  # shorter than the sequences: kept within each
    "gemma2": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_rows_packed_by_lengths_equal_sequences_alone(name: str, monkeypatch) -> None:
    """FlashAttention is told where sequences begin, in any number of rows; windows are those of each sequence."""
    use_stand_in(monkeypatch)
    model = model_of(*BY_LENGTH[name], "eager")
    loss, gradient = loss_and_gradient(model)
    model.config._attn_implementation = "flash_attention_2"  # loading would ask for the package
    assert block_mask_obstacle(model, LONGEST) is None
    for layout in ({}, LAYOUTS["packed"], {"packing_tokens": 80}):
        found, found_gradient = loss_and_gradient(model, **layout)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm(), layout
    assert block_mask_failure(Policy(model)) is None


def test_flash_attention_is_given_no_mask_and_no_shared_prompts(monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of(*ARCHITECTURES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    for layout in ("shared", "packed_shared"):
        with pytest.raises(UserError, match="share their prompts"):
            Policy(model).hidden_at_targets(collate(sequences(), 0, **LAYOUTS[layout]))
    with pytest.raises(UserError, match="takes no block masks"):
        attention_mask(collate(sequences(), 0, packing_tokens=24), model)


def test_where_sequences_begin_is_counted_once_and_the_same_from_the_rows(monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of(*ARCHITECTURES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    batch = collate(sequences(), 0, "full", packing_tokens=24)
    given = attention_inputs(batch, model)
    assert given["cu_seq_lens_q"] is batch.starts
    assert torch.equal(attention_inputs(replace(batch, starts=None), model)["cu_seq_lens_q"], batch.starts)
    held, width = batch.segment_ids > 0, batch.input_ids.shape[1]
    begins = (batch.position_ids == 0) & held
    assert set(begins.flatten().nonzero()[:, 0].tolist()) <= set(batch.starts.tolist())
    assert not held.all()
    assert batch.starts[-1] == held.numel()
    assert given["max_length_q"] == width
    assert attention_inputs(collate(sequences(), 0), model) == {}


def test_lengths_that_do_not_arrive_are_found_by_trying(monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of(*ARCHITECTURES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    forward = type(model.model).forward

    def forgetful(self, *given, cu_seq_lens_q=None, cu_seq_lens_k=None, **rest):
        return forward(self, *given, **rest)

    monkeypatch.setattr(type(model.model), "forward", forgetful)
    assert "does not keep packed sequences apart" in block_mask_failure(Policy(model))


@pytest.mark.parametrize(("asked", "packed"), [(None, 16), (24, 24)])
def test_a_run_by_lengths_packs_and_shares_no_prompts(asked, packed, monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of(*ARCHITECTURES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    data = {"packing_tokens": asked, "max_length": 16}
    config = RunConfig.model_validate({"model": {"attention": "flash_attention_2"}, "data": data})
    assert RunConfig.model_validate({"data": data}).packing_tokens == asked
    assert row_layout(config, Policy(model)) == {"packing_tokens": packed, "shared_prefix": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_rows_equal_sequences_alone(name: str) -> None:
    model = model_of(*ARCHITECTURES[name], "eager")
    policy = Policy(model)
    batch = collate(sequences(), 0, "full")
    with torch.no_grad():
        together = policy.hidden_at_targets(batch)
        alone = torch.cat(
            [policy.hidden_at_targets(collate([one], 0, "full", pad_to_multiple=1)) for one in sequences()]
        )
        own = torch.cat(
            [
                model.base_model(input_ids=torch.tensor([one.ids])).last_hidden_state[0, first - 1 : -1]
                for one in sequences()
                for first in [1 if one.role == 0 else one.completion_start]
            ]
        )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, own, rtol=1e-5, atol=1e-5)


def test_a_leak_would_show() -> None:
    """The comparison above fails when packed sequences see each other."""
    model = model_of(*ARCHITECTURES["llama"])
    policy = Policy(model)
    batch = collate(sequences(), 0, "full", packing_tokens=24)
    with torch.no_grad():
        good = policy.hidden_at_targets(batch)
        leaky = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids * 0 + 1)
    assert (leaky.last_hidden_state.flatten(0, 1)[batch.target_positions] - good).norm() > 0.1 * good.norm()


@pytest.mark.parametrize("name", OTHER_RULES)
def test_other_rules_are_recognised(name: str) -> None:
    architecture, settings, key = OTHER_RULES[name]
    model = model_of(architecture, settings, "eager")
    assert key in block_mask_obstacle(model, LONGEST)
    for options in LAYOUTS.values():
        with pytest.raises(UserError, match=r"packing_tokens to null and data\.shared_prefix to false"):
            Policy(model).hidden_at_targets(collate(sequences(), 0, **options))
    Policy(model).hidden_at_targets(collate(sequences(), 0))  # the ordinary path


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Bloom", {"n_head": 4, "n_layer": 2}),
        ("Mamba", {"state_size": 4}),
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4}),
    ],
)
def test_models_whose_config_does_not_tell_are_found_by_trying(architecture: str, settings: dict) -> None:
    model = model_of(architecture, settings, "eager")
    assert block_mask_obstacle(model, LONGEST) or block_mask_failure(Policy(model))


def test_a_window_that_no_sequence_outgrows_is_no_obstacle_in_a_wide_row() -> None:
    model = model_of(*ARCHITECTURES["mistral"])
    batch = collate(sequences(), 0, packing_tokens=48)
    assert batch.input_ids.shape[1] > LONGEST
    assert attention_mask(batch, model).shape[-1] == batch.input_ids.shape[1]


def test_rows_of_one_sequence_need_no_mask() -> None:
    assert attention_mask(collate(sequences(), 0), tiny_model()) is None


def test_a_packed_batch_without_branch_ids_is_refused() -> None:
    """It would be taken for one sequence a row, and they would see each other."""
    forgotten = replace(collate(sequences(), 0, packing_tokens=24), branch_ids=None)
    for use in (lambda: attention_mask(forgotten, tiny_model()), lambda: forgotten.to("meta")):
        with pytest.raises(UserError, match="branch_ids is None"):
            use()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rule_of_flex_attention_is_the_dense_mask(layout: str) -> None:
    batch = collate(sequences(), 0, **LAYOUTS[layout])
    rows, width = batch.input_ids.shape
    model = tiny_model()
    dense = attention_mask(batch, model)
    rule = create_mask(visibility(batch), rows, None, width, width, device="cpu")
    assert torch.equal(rule, dense == 0)
    assert rule.diagonal(dim1=-2, dim2=-1).all()  # padding sees itself
    assert not rule.triu(1).any()
    model.set_attn_implementation("flex_attention")
    blocks = attention_mask(batch, model)
    assert torch.equal(create_mask(blocks.mask_mod, rows, None, width, width, device="cpu"), rule)

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, 2, width, 8, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=blocks), expected, rtol=1e-5, atol=1e-5)

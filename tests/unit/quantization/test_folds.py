"""A fold moves a scale without changing the model: every architecture of the table, every fold of its blocks."""

from __future__ import annotations

import pytest
import torch
import transformers

from calibtrain.quantization.blocks import find_blocks
from calibtrain.quantization.folds import apply_fold, folds_of, no_folds_reason, shared_by_heads, weight_in

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
CONFIGS = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped queries": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "mlp_only_layers": [0]}),
}
SOURCES = {
    "gpt2": ["ln_1", "attn.c_attn", "ln_2"],
    "gemma2": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "mixtral": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.experts.gate_up_proj"],
    "qwen2_moe": [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.experts.gate_up_proj",
        "mlp.shared_expert.up_proj",
    ],
}


def build(name: str, dtype: torch.dtype):
    kind, others = CONFIGS[name]
    config = getattr(transformers, kind)(**{**COMMON, **others})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
        for parameter in model.parameters():  # weights, norms and biases that all matter
            size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.data.add_(torch.randn_like(parameter) * size)
    return model.to(dtype)


def scale_for(block, fold, seed: int):
    weight = weight_in(block, fold.targets[0])
    shape = weight.shape[:1] + weight.shape[2:] if fold.reads is None else weight.shape[-1:]
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64))
    return shared_by_heads(fold, scale, "max")


def fold_all(model, only: str | None = None) -> None:
    for index, block in enumerate(find_blocks(model)[1]):
        for number, fold in enumerate(folds_of(model, block)):
            if only in (None, fold.source):
                apply_fold(block, fold, scale_for(block, fold, 10 * index + number))


def logits(model):
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_every_fold_is_exact_in_float64(name, request):
    model = build(name, torch.float64)
    request.getfixturevalue("in_float64")
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    fold_all(model)
    assert (logits(model) - before).abs().max() < 1e-10
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert len(changed) > 3 * 5  # norms, values, what reads them, in every block


def rms(x) -> float:
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_folds_cost_no_more_than_rounding_in_bfloat16(name):
    model, same = build(name, torch.bfloat16), build(name, torch.bfloat16).float()
    before, in_float32 = logits(model).float(), logits(same)
    fold_all(model)
    after = logits(model).float()
    # Tokens near the border between two experts may go to the other one.
    mixture = "mixtral" in name or "moe" in name
    assert rms(after - before) < 2 * rms(before - in_float32)  # bfloat16's own noise in this model
    assert rms(logits(model.float()) - in_float32) < (2e-2 if mixture else 1e-2) * rms(before)  # that of the weights


def test_a_norm_near_minus_one_stays_exact():
    """1 + w = 1/100 keeps one or two digits in bfloat16; what it really took goes into the columns."""
    model = build("gemma2", torch.bfloat16)
    block = find_blocks(model)[1][0]
    fold = folds_of(model, block)[0]
    x, norm = torch.randn(50, 32), block.input_layernorm
    before = norm.float()(x) @ block.self_attn.q_proj.weight.float().T
    apply_fold(block, fold, torch.full((32,), 130.0))
    after = norm(x) @ block.self_attn.q_proj.weight.float().T
    assert rms(after - before) < 4e-3 * rms(before)


def test_bfloat16_rounds_once():
    model = build("llama", torch.bfloat16)
    block = find_blocks(model)[1][0]
    up, down = block.mlp.up_proj.weight.double(), block.mlp.down_proj.weight.double()
    bias = block.mlp.up_proj.bias.double()
    scale = torch.linspace(0.3, 3.0, 48)
    apply_fold(block, folds_of(model, block)[3], scale)
    assert torch.equal(block.mlp.up_proj.weight.double(), (up / scale[:, None].double()).bfloat16().double())
    assert torch.equal(block.mlp.up_proj.bias.double(), (bias / scale.double()).bfloat16().double())
    assert torch.equal(block.mlp.down_proj.weight.double(), (down * scale.double()).bfloat16().double())


@pytest.mark.parametrize(("name", "sources"), SOURCES.items())
def test_where_scales_come_from(name, sources):
    model = build(name, torch.float32)
    assert [fold.source for fold in folds_of(model, find_blocks(model)[1][0])] == sources
    published = [fold.source for fold in folds_of(model.config, find_blocks(model)[1][0]) if fold.published]
    assert published == [source for source in sources if "norm" in source or "ln_" in source]


def test_what_lies_between_must_be_linear():
    """gpt2: c_fc -> mlp.c_proj has a GELU between them, so no fold of the table names it."""
    model = build("gpt2", torch.float32)
    folds = folds_of(model, find_blocks(model)[1][0])
    assert "mlp.c_proj" not in {target for fold in folds for target in fold.targets}


def test_a_dense_block_of_a_mixture_is_folded_as_one():
    model = build("qwen2_moe", torch.float32)
    mixed, dense, _ = find_blocks(model)[1]
    assert folds_of(model, dense)[2].targets == ("mlp.gate_proj", "mlp.up_proj")
    assert "mlp.gate" in folds_of(model, mixed)[2].targets  # the router reads the same norm
    assert "mlp.shared_expert_gate" in folds_of(model, mixed)[2].targets


def test_query_heads_share_a_scale():
    model = build("llama", torch.float32)
    block = find_blocks(model)[1][0]
    fold = folds_of(model, block)[1]
    scale = torch.rand(32) + 0.5
    with pytest.raises(ValueError, match="share"):
        apply_fold(block, fold, scale)
    for how in ("max", "mean"):
        shared = shared_by_heads(fold, scale, how).view(2, 2, 8)
        assert torch.equal(shared[:, 0], shared[:, 1])
        assert torch.equal(shared[:, 0], getattr(scale.view(2, 2, 8), how if how == "mean" else "amax")(1))


def test_an_unknown_architecture_is_folded_nowhere_and_said():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    model = transformers.BloomForCausalLM(config)
    assert folds_of(model, model.transformer.h[0]) == []
    assert "'bloom'" in no_folds_reason(model)
    assert no_folds_reason(build("llama", torch.float32)) is None


def test_a_multimodal_model_is_folded_by_its_text():
    assert no_folds_reason(transformers.Gemma3Config()) is None

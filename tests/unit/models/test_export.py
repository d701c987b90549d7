"""The scale folds into every kind of final norm or head that is accepted, and nothing else is accepted."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models import streamed_export
from calibtrain.models.adapters import add_lora
from calibtrain.models.export import (
    check_scale_folds,
    export_adapter,
    export_model,
    fold_scale,
    gathered_weights,
    merger,
    restored_model,
)
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.policy import Policy, check_head
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_model

IDS = torch.arange(20, 40)[None]


def small(kind, **overrides):
    import transformers

    common = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
    if kind == "GPT2":
        common = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if kind == "GPTNeoX":
        common = {key: common[key] for key in common if key not in ("num_key_value_heads", "head_dim")}
    if kind == "Phi":
        common = {key: common[key] for key in common if key != "head_dim"}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**{**common, **tokens, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases away from 1 and 0
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


MODELS = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False}),
    "gemma: 1 + weight": ("Gemma", {}),
    "gpt2: bias in the norm": ("GPT2", {}),
    "neox untied": ("GPTNeoX", {"tie_word_embeddings": False}),
    "neox tied": ("GPTNeoX", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "granite: logits divided": ("Granite", {"logits_scaling": 4.0, "tie_word_embeddings": True}),
    "cohere: logits scaled": ("Cohere", {"logit_scale": 0.25}),
    "gemma 2: softcap": ("Gemma2", {"final_logit_softcapping": 5.0}),
    "phi: bias in the head": ("Phi", {"tie_word_embeddings": False}),
}


@torch.no_grad()
def own(model):
    return model(input_ids=IDS, use_cache=False).logits[0].float().log_softmax(-1)


@torch.no_grad()
def scaled(model, scale):
    """What the policy says at a scale, which is what the report measures."""
    policy = Policy(model)
    policy.scale = scale
    hidden = policy.backbone(input_ids=IDS, use_cache=False).last_hidden_state[0]
    return policy.logits(policy.scaled(hidden)).log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_head_is_understood(name):
    kind, overrides = MODELS[name]
    model = small(kind, **overrides)
    check_head(Policy(model).eval())
    torch.testing.assert_close(scaled(model, 1.0), own(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.7])
@pytest.mark.parametrize("name", MODELS)
def test_folded_model_says_what_the_scaled_policy_said(name, scale):
    kind, overrides = MODELS[name]
    model = small(kind, **overrides)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = scaled(model, scale)
    check_scale_folds(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "the check leaves no trace"
    )
    fold_scale(model, scale)
    assert (own(model) - expected).abs().max() < 1e-3
    assert (expected - scaled(small(kind, **overrides), 1.0)).abs().max() > 1e-2


def test_final_norm_without_a_weight_is_refused():
    model = small("Llama", tie_word_embeddings=True)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        check_scale_folds(model)


def test_head_that_does_something_else_is_refused():
    class Odd(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 3.0

    model = tiny_model(tied=False, initializer_range=0.3)
    odd = Odd(32, 400, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    with pytest.raises(UserError, match="is not supported"):
        check_head(Policy(model))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 8.0}, {"r": 4, "rank_stabilized": True, "dora": True}])
def test_exported_directory_loads_plainly(tmp_path, tied, lora, dtype):
    from transformers import AutoModelForCausalLM

    config = ModelConfig(source=str(write_tiny_model(tmp_path / "tiny", tied=tied)), dtype=dtype, lora=lora)
    model = load_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    policy = Policy(model).eval()
    expected = scaled(model, 0.7)
    export_model(policy, config, load_tokenizer(config), tmp_path / "out", 0.7)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.tie_word_embeddings == tied
    assert (own(loaded) - expected).abs().max() < (1e-4 if dtype == "fp32" else 0.15)
    assert load_tokenizer(config.model_copy(update={"source": str(tmp_path / "out")})).eos_token_id == 1
    assert gathered_weights(policy, keep=False) == {}


ADAPTED = {
    "tied": {},
    "untied": {},
    "bf16": {"dtype": "bf16"},
    "lora": {"lora": {"r": 2, "alpha": 8.0}},
    "lora bf16": {"dtype": "bf16", "lora": {"r": 2, "alpha": 8.0}},
    "dora": {"dtype": "bf16", "lora": {"r": 2, "rank_stabilized": True, "dora": True}},
    "lora of embeddings": {"lora": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}},
    "oft": {"dtype": "bf16", "adapter": {"kind": "oft", "block_size": 8, "target_modules": ["q_proj"]}},
    "rotation": {"dtype": "bf16", "adapter": {"kind": "shared_rotation", "rank": 4}},
    "experts": {},
    "a token more": {},
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_files_written_a_layer_at_a_time_hold_what_the_whole_model_would_save(kind, tmp_path, monkeypatch):
    source = tmp_path / "source"
    if kind == "experts":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        settings = MixtralConfig(vocab_size=50, num_local_experts=3, num_key_value_heads=1, **sizes)
        MixtralForCausalLM(settings).save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
    else:
        write_tiny_model(source, tied=kind in ("tied", "a token more"), layers=3)
    config = ModelConfig(**{"source": str(source), "dtype": "fp32", **ADAPTED[kind]})
    model = load_model(config)
    if kind == "a token more":
        model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    policy = Policy(model).eval()
    whole = restored_model(gathered_weights(policy, keep=True), config)
    fold_scale(whole, 0.7)
    whole.config.use_cache = True
    whole.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(streamed_export, "FILE_BYTES", 20_000)
    export_model(policy, config, tiny_tokenizer(), tmp_path / "out", 0.7)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    found = {name: one for file in files for name, one in load_file(tmp_path / "out" / file).items()}
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(one.dtype == expected[name].dtype and one.equal(expected[name]) for name, one in found.items())
    assert index["metadata"]["total_size"] == sum(one.numel() * one.element_size() for one in found.values())
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("out", "whole")]
    assert configs[0] == configs[1]
    assert all(one.is_meta for one in merger(policy, config).parameters.values())


@pytest.mark.parametrize("lora", [{"r": 2, "alpha": 8.0}, {"r": 4, "rank_stabilized": True, "dora": True}])
def test_the_adapter_alone_makes_the_trained_model_of_the_one_it_started_from(tmp_path, lora):
    from peft import PeftModel

    config = ModelConfig(source=str(write_tiny_model(tmp_path / "tiny")), dtype="fp32", lora=lora)
    model = load_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    kept = {name: one.detach().clone() for name, one in model.named_parameters()}
    export_adapter(Policy(model).eval(), config, tmp_path / "adapter")
    assert all(one.equal(kept[name]) for name, one in model.named_parameters())
    base = load_model(config.model_copy(update={"lora": None}))
    torch.testing.assert_close(own(PeftModel.from_pretrained(base, tmp_path / "adapter")), own(model))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert str(tmp_path / "tiny") in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_no_weight_is_initialised_to_be_written_over(tmp_path, monkeypatch):
    config = ModelConfig(source=str(write_tiny_model(tmp_path / "tiny")), dtype="fp32")
    model = load_model(config)
    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *a, **k: (drawn.append(self.device.type), self)[1])
    export_model(Policy(model), config, load_tokenizer(config), tmp_path / "out")
    assert set(drawn) <= {"meta"}


def test_unknown_lora_targets_are_refused(tmp_path):
    config = ModelConfig(source=str(tmp_path), lora={"target_modules": ["nowhere"]})
    with pytest.raises(UserError, match=r"model\.lora\.target_modules"):
        add_lora(tiny_model(), config)

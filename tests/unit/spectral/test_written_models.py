"""Written models do what was asked of them: told by what their modules compute, not by how their tensors are laid out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibtrain.errors import UserError
from calibtrain.spectral.directories import open_pairs
from calibtrain.spectral.written_models import write_model
from tests.tiny import write_tiny_model

transformers = pytest.importorskip("transformers")
COMMON = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FUSED = {
    # name: (model type, its config, the module that takes what attention gives)
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}, "attn.c_proj"),
    "gpt": ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}, "attn.c_proj"),
    "phi3": ("phi3", GROUPED, "self_attn.o_proj"),
    "phi3 with as many keys": ("phi3", LLAMA, "self_attn.o_proj"),
    "gpt_neox": ("gpt_neox", LLAMA, "attention.dense"),
    "gpt_neox_japanese": ("gpt_neox_japanese", LLAMA, "attention.dense"),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}, "self_attention.dense"),
    "falcon": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "self_attention.dense"),
    "falcon with one key": ("falcon", {**FALCON, "multi_query": True}, "self_attention.dense"),
    "falcon with as many keys": ("falcon", {**FALCON, "multi_query": False, "alibi": True}, "self_attention.dense"),
    "starcoder": ("gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}, "attn.c_proj"),
    "starcoder with as many keys": (
        "gpt_bigcode",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "multi_query": False},
        "attn.c_proj",
    ),
    "codegen": (
        "codegen",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "rotary_dim": 4},
        "attn.out_proj",
    ),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}, "attn.out_proj"),
    "persimmon": ("persimmon", {**LLAMA, "qk_layernorm": False}, "self_attn.dense"),
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 3, "moe_top_k": 2},
        },
        "norm_attn_norm.attn.out_proj",
    ),
}


def two_models(folder, kind, settings, **saving):
    """A base and a tuned model directory, with other numbers in each."""
    for seed, side in enumerate(("base", "tuned")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = transformers.AutoConfig.for_model(kind, **{**COMMON, **settings})
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                # Larger than the models' own, for attention to be far from even, and biases that hide nothing.
                parameter.data = 0.3 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter.data
                if name.endswith("bias"):
                    parameter.data.zero_()
            model.save_pretrained(folder / side, **saving)
    return folder / "base", folder / "tuned"


def seen(path, module, of="input"):
    """What the module of layer 0 with this ending gets or gives in a model's forward of a few tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    found = next(part for name, part in model.named_modules() if name.endswith("0." + module))
    kept = []
    found.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0] if of == "input" else output))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def times(factor, label):
    """A change that multiplies the parts of this label."""
    return lambda pair, before, after: after * (factor if pair.name.endswith(f"[{label}]") else 1)


@pytest.mark.parametrize("name", FUSED)
def test_queries_keys_and_values_are_what_attention_makes_of_them(tmp_path, name):
    kind, settings, output = FUSED[name]
    base, tuned = two_models(tmp_path, kind, settings)
    labels = {pair.name[-3:] for pair in open_pairs(base, tuned).pairs if pair.name.endswith("]")}
    assert {"[q]", "[k]", "[v]"} <= labels
    attended = {"as it is": seen(tuned, output)}
    for label in "qkv":
        write_model(base, tuned, tmp_path / label, times(0, label))
        attended[label] = seen(tmp_path / label, output)
    assert not attended["v"].any()
    # Without queries all keys are alike, and without keys all queries.
    assert torch.allclose(attended["q"], attended["k"], atol=1e-6)
    assert (attended["q"] - attended["as it is"]).abs().max() > 1e-3
    # A value that is doubled doubles what attention gives.
    write_model(base, tuned, tmp_path / "double", times(2, "v"))
    assert torch.allclose(seen(tmp_path / "double", output), 2 * attended["as it is"], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("phi3", "mlp"), ("glm", "mlp"), ("granitemoe", "block_sparse_moe"), ("mixtral stacked", "mlp")],
)
def test_of_gate_and_up_only_up_is_linear(tmp_path, kind, module):
    base, tuned = two_models(tmp_path, kind.split()[0], {**GROUPED, "num_local_experts": 3})
    if kind == "mixtral stacked":
        stack(base), stack(tuned)
    before = seen(tuned, module, "output")
    for label in ("gate", "up"):
        write_model(base, tuned, tmp_path / label, times(-1, label))
        negated = torch.allclose(seen(tmp_path / label, module, "output"), -before, atol=1e-6)
        assert negated == (label == "up")


def stack(path):
    """Store a model as its modules hold it, experts in one tensor."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})


def test_experts_of_gpt_oss_alternate_gate_and_up(tmp_path):
    settings = {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}
    base, tuned = two_models(tmp_path, "gpt_oss", settings)
    for label in ("gate", "up"):
        write_model(base, tuned, tmp_path / label, times(0, label))
        # (up + 1) * gate * sigmoid(alpha * gate)
        assert seen(tmp_path / label, "mlp.experts", "output").any() == (label == "up")


@pytest.mark.parametrize(
    ("kind", "settings", "module", "site"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 1}, "attn.c_proj", "attn.c_proj"),  # square: no shape tells
        ("llama", LLAMA, "o_proj", "self_attn.o_proj"),
        ("gpt_oss", {**GROUPED, "intermediate_size": 32, "num_local_experts": 8}, "experts.down_proj", "mlp.experts"),
        ("mixtral", {**GROUPED, "intermediate_size": 32, "num_local_experts": 3}, "experts.w2", "mlp"),
        ("qwen3_moe", {**GROUPED, "moe_intermediate_size": 32, "num_experts": 8}, "experts.down_proj", "mlp"),
        (
            "granitemoe",
            {**GROUPED, "intermediate_size": 32, "num_local_experts": 3},
            "output_linear",
            "block_sparse_moe",
        ),
        ("dbrx", FUSED["dbrx"][1] | {"n_layers": 1}, "experts.w2", "ffn"),
    ],
)
def test_rows_are_outputs(tmp_path, kind, settings, module, site):
    def third_row_alone(pair, before, after):
        return after * (torch.arange(pair.shape[0]) == 3)[:, None]

    base, tuned = two_models(tmp_path, kind, settings)
    write_model(base, tuned, tmp_path / "out", third_row_alone, modules=[module])
    output = seen(tmp_path / "out", site, "output").reshape(-1, 32)
    assert output[:, 3].any()
    assert not output[:, [*range(3), *range(4, 32)]].any()


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    base, tuned = two_models(folder, "llama", GROUPED, max_shard_size="20KB")
    assert (tuned / "model.safetensors.index.json").is_file()
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (tuned / "optimizer.pt").write_bytes(b"old")
    return base, tuned


def test_only_the_chosen_matrices_change(llamas, tmp_path):
    base, tuned = llamas
    output = tmp_path / "new" / "model"
    write_model(base, tuned, output, lambda pair, before, after: before, layers={1}, modules=["q_proj"])
    changed = set()
    for file in sorted(tuned.rglob("*")):
        copy = output / file.relative_to(tuned)
        if file.suffix == ".safetensors":
            old, new = load_file(file), load_file(copy)
            changed |= {name for name in old if not torch.equal(old[name], new[name])}
            assert copy.stat().st_size == file.stat().st_size
        elif file.is_file() and file.name != "optimizer.pt":
            assert copy.read_bytes() == file.read_bytes()
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}
    assert not (output / "optimizer.pt").exists()
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    first, written = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (base, output))
    assert torch.equal(first.model.layers[1].self_attn.q_proj.weight, written.model.layers[1].self_attn.q_proj.weight)
    assert torch.equal(
        open_pairs(base, output, layers={1}, modules=["q_proj"]).pairs[0].read()[1],
        first.model.layers[1].self_attn.q_proj.weight,
    )


def test_results_are_rounded_to_the_stored_dtype(tmp_path):
    base, tuned = (write_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    transformers.AutoModelForCausalLM.from_pretrained(tuned).bfloat16().save_pretrained(tuned)
    middle = lambda pair, before, after: (before.double() + after.double()) / 2  # noqa: E731
    write_model(base, tuned, tmp_path / "out", middle, modules=["down_proj", "embed_tokens"])
    for pair, written in zip(
        open_pairs(base, tuned, modules=["down_proj", "embed_tokens"]).pairs,
        open_pairs(base, tmp_path / "out", modules=["down_proj", "embed_tokens"]).pairs,
        strict=True,
    ):
        assert written.read()[1].dtype == torch.bfloat16
        assert torch.equal(written.read()[1], middle(pair, *pair.read()).bfloat16())


def test_a_head_that_is_a_second_copy_of_the_embedding_follows_it(tmp_path):
    base, tuned = (write_tiny_model(tmp_path / str(seed), seed=seed, tied=True) for seed in (0, 1))
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    write_model(base, tuned, tmp_path / "out", lambda pair, before, after: before, modules=["embed_tokens"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_fails_half_way(llamas, tmp_path, failure):
    calls = []

    def fails(pair, before, after):
        calls.append(pair)
        if len(calls) == 5:
            raise failure
        return after

    with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else UserError):
        write_model(*llamas, tmp_path / "out", fails)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_it_starts(llamas, tmp_path, monkeypatch):
    def never(pair, before, after):
        raise AssertionError

    base, tuned = llamas
    with pytest.raises(UserError, match="is there already; give a new or empty directory"):
        write_model(base, tuned, base, never)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is there already"):
        write_model(base, tuned, tmp_path / "file", never)
    with pytest.raises(UserError, match="cannot be written"):
        write_model(base, tuned, tmp_path / "file" / "out", never)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="GiB are needed"):
        write_model(base, tuned, tmp_path / "out", never)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="merge it first"):
        write_model(base, adapter, tmp_path / "out", never)


def test_a_result_that_does_not_fit_is_refused(llamas, tmp_path):
    (tmp_path / "out").mkdir()  # empty: may be used
    with pytest.raises(UserError, match=r"q_proj.weight: the changed matrix has values that float32 cannot hold"):
        write_model(*llamas, tmp_path / "out", lambda pair, before, after: after.double() * 1e300, modules=["q_proj"])
    with pytest.raises(ValueError, match="the change gave"):
        write_model(*llamas, tmp_path / "out", lambda pair, before, after: after[:1], modules=["q_proj"])
    write_model(*llamas, tmp_path / "out", lambda pair, before, after: after, modules=["q_proj"])
    assert (Path(tmp_path) / "out" / "config.json").is_file()

"""What is written is what plain transformers loads: the same numbers, whole or not at all, gone on with after a stop."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models.loading import check_weights, load_model
from calibtrain.models.policy import Policy, check_head
from calibtrain.quantization import directory
from calibtrain.quantization.affine import quantize_weight
from calibtrain.quantization.blocks import matrices_in
from calibtrain.quantization.directory import ModelWriter
from calibtrain.quantization.formats import packing_of
from calibtrain.quantization.readers import (
    check_ignored,
    check_readable,
    fused_parameters,
    quantize_experts,
    routers,
    stored_names,
)
from calibtrain.quantization.schemes import scheme_of
from tests.quantized import add_block, outside_blocks, quantized_blocks, quantized_in_memory, write_quantized
from tests.tiny import write_tiny_model

SCHEMES = {
    "w8a8": scheme_of("w8a8"),
    "w8a8 static": scheme_of("w8a8", static=True),
    "w8a16": scheme_of("w8a16", group_size=64),
    "w8a16 asymmetric": scheme_of("w8a16", group_size=32, asymmetric=True),
    "w4a16": scheme_of("w4a16", group_size=32),
    "w4a16, 128": scheme_of("w4a16"),
    "w4a16 asymmetric": scheme_of("w4a16", group_size=32, asymmetric=True),
    "w4a16 asymmetric, 64": scheme_of("w4a16", group_size=64, asymmetric=True),
    "fp8": scheme_of("fp8"),
    "fp8 static": scheme_of("fp8", static=True),
    "w4a16, cache": scheme_of("w4a16", group_size=32, kv_cache=True),
    "fp8, cache": scheme_of("fp8", kv_cache=True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories in fp32 and bf16: several groups in a row, grouped queries, biases beside some weights."""
    found = {}
    for name, dtype in DTYPES.items():
        path = write_tiny_model(
            tmp_path_factory.mktemp(name) / "model",
            hidden=128,
            attention_bias=True,
            initializer_range=0.1,
            max_position_embeddings=64,
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(0))
        model.generation_config.eos_token_id = [1, 2]
        model.save_pretrained(path)
        found[name] = path
    return found


def tokens():
    return torch.randint(3, 400, (3, 24), generator=torch.Generator().manual_seed(0))


def greedy(model, steps=6):
    ids = tokens()
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -steps:]


def logprobs(model):
    return model(tokens()).logits.float().log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bf16") for name in SCHEMES] + [(name, "fp32") for name in ("w8a8", "w4a16 asymmetric", "fp8 static")],
)
@torch.no_grad()
def test_transformers_loads_what_was_in_memory(sources, tmp_path, name, dtype):
    scheme = SCHEMES[name]
    source = AutoModelForCausalLM.from_pretrained(sources[dtype]).eval()
    target = write_quantized(source, sources[dtype], tmp_path / "out", scheme)
    loaded = AutoModelForCausalLM.from_pretrained(target).eval()
    ours = Policy(load_model(ModelConfig(source=str(target), dtype=dtype))).eval()
    ours.backbone(input_ids=tokens(), use_cache=False)  # the decoder by itself, before the whole
    check_head(ours)
    assert torch.equal(logprobs(loaded), logprobs(ours.causal_model))
    for weights, others in quantized_blocks(source, scheme):
        for layer, weight in weights.items():
            found = ours.causal_model.get_submodule(layer)
            assert found.weight.dtype == DTYPES[dtype]
            assert torch.equal(found.weight, weight.dequantized())
        for parameter, value in others.items():
            assert torch.equal(ours.causal_model.get_parameter(parameter), value)
    if scheme.kv_cache:
        return
    with quantized_in_memory(source, scheme):
        difference = (logprobs(source) - logprobs(loaded)).abs().max()
        if scheme.activations is None:
            assert difference == 0
            assert torch.equal(greedy(source), greedy(loaded))
        elif dtype == "fp32":
            assert difference < 1e-4
            assert torch.equal(greedy(source), greedy(loaded))
        else:  # transformers divides by the scale in bf16, so that a number between two may go to the other one
            assert difference < 0.5


@torch.no_grad()
def test_the_cache_is_rounded_too(sources, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(sources["fp32"]).eval()
    plain, rounded = (
        AutoModelForCausalLM.from_pretrained(
            write_quantized(source, sources["fp32"], tmp_path / str(cache), scheme_of("fp8", kv_cache=cache))
        )
        for cache in (False, True)
    )
    assert 0 < (logprobs(plain) - logprobs(rounded)).abs().max() < 1


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.activations is None])
def test_packing_is_the_librarys(sources, name):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from calibtrain.quantization.formats import quantization_config

    scheme = SCHEMES[name]
    packing = packing_of(scheme)
    entry = quantization_config(scheme, ["lm_head"])
    group = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(packing.name)
    source = AutoModelForCausalLM.from_pretrained(sources["fp32"])
    weights, _ = next(quantized_blocks(source, scheme))
    for weight in weights.values():
        ours = packing.pack(weight)
        given = {"weight": weight.dequantized(), "weight_scale": weight.scale}
        if not weight.grid.symmetric:
            assert weight.zero.any()
            given["weight_zero_point"] = weight.zero.to(torch.int8)
        theirs = compressor.compress(given, group)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
        assert torch.equal(compressor.decompress(ours, group)["weight"], weight.dequantized())
        back = packing.unpack(ours)
        assert torch.equal(back.values, weight.values)
        assert torch.equal(back.zero, weight.zero)


def test_config_and_files_are_carried_over(sources, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(sources["bf16"])
    path = shutil.copytree(sources["bf16"], tmp_path / "source")
    others = {"adapter_config.json", "calibration.json", "optimizer.pt"}
    for name in others:
        (path / name).write_text("{}")
    target = write_quantized(source, path, tmp_path / "a" / "out", SCHEMES["w4a16"], ignore=("down_proj",))
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    layers = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert config["quantization_config"]["ignore"] == ["lm_head", *layers]
    stored = load_file(target / "model.safetensors")
    assert stored[f"{layers[0]}.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in stored  # tied
    assert sum(one.nbytes for one in stored.values()) < 0.6 * (path / "model.safetensors").stat().st_size
    tokenizer, before = (AutoTokenizer.from_pretrained(one) for one in (target, path))
    message = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(message) == before.apply_chat_template(message)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert not others & {one.name for one in target.iterdir()}
    assert [one.name for one in target.parent.iterdir()] == ["out"]
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.get_parameter(f"{layers[0]}.weight"), source.get_parameter(f"{layers[0]}.weight"))


@torch.no_grad()
def test_shards_and_an_untied_head(tmp_path, monkeypatch):
    path = write_tiny_model(tmp_path / "model", tied=False, hidden=128)
    source = AutoModelForCausalLM.from_pretrained(path)
    whole = write_quantized(source, path, tmp_path / "whole", SCHEMES["w4a16 asymmetric"])
    monkeypatch.setattr(directory, "SHARD_BYTES", 300_000)
    cut = write_quantized(source, path, tmp_path / "cut", SCHEMES["w4a16 asymmetric"])
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 2
    assert {one.name for one in files} == set(index["weight_map"].values())
    assert all(one.stat().st_size < 310_000 for one in files)
    tensors = {name: one for file in files for name, one in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in tensors.values())
    assert tensors.keys() == load_file(whole / "model.safetensors").keys()
    assert "lm_head.weight" in tensors
    a, b = (AutoModelForCausalLM.from_pretrained(one) for one in (whole, cut))
    assert torch.equal(logprobs(a), logprobs(b))


@pytest.mark.parametrize("name", ["w8a8 static", "w4a16 asymmetric", "w4a16, cache", "fp8"])
def test_an_interrupted_run_goes_on(sources, tmp_path, name):
    source, scheme, target = AutoModelForCausalLM.from_pretrained(sources["bf16"]), SCHEMES[name], tmp_path / "out"
    first, second = quantized_blocks(source, scheme)
    add_block(ModelWriter(sources["bf16"], target, scheme, "a"), 0, *first)
    again = ModelWriter(sources["bf16"], target, scheme, "a")
    assert again.done() == 1
    weights, others = again.read_block(0)
    assert weights.keys() == first[0].keys()
    for layer, weight in first[0].items():
        for field in ("values", "scale", "zero"):
            assert torch.equal(getattr(weights[layer], field), getattr(weight, field))
        assert weights[layer].dtype == weight.dtype
        assert torch.equal(weights[layer].dequantized(), weight.dequantized())
    assert others.keys() == first[1].keys()
    assert all(torch.equal(others[one], first[1][one]) for one in others)
    inputs, cache = again.read_scales(0)
    assert inputs.keys() == (weights.keys() if scheme.static else set())
    assert len(cache) == 2 * scheme.kv_cache
    add_block(again, 1, *second)
    again.finish(outside_blocks(source), [])
    straight = write_quantized(source, sources["bf16"], tmp_path / "straight", scheme)
    assert (target / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_blocks_of_other_settings_are_thrown_away(sources, tmp_path):
    source, scheme = AutoModelForCausalLM.from_pretrained(sources["fp32"]), SCHEMES["w8a8"]
    first, _ = quantized_blocks(source, scheme)
    add_block(ModelWriter(sources["fp32"], tmp_path / "out", scheme, "a"), 0, *first)
    other = ModelWriter(sources["fp32"], tmp_path / "out", scheme, "b")
    assert other.done() == 0
    other.abandon()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_at_once(sources, tmp_path):
    source, scheme = sources["fp32"], SCHEMES["w8a8"]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out: exists already"):
        ModelWriter(source, tmp_path / "out", scheme, "a")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"mine\.partial: is in the way"):
        ModelWriter(source, tmp_path / "mine", scheme, "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written"):
        ModelWriter(source, tmp_path / "file" / "out", scheme, "a")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        ModelWriter(tmp_path, tmp_path / "new", scheme, "a")
    with pytest.raises(UserError, match="--asymmetric"):
        ModelWriter(source, tmp_path / "new", scheme_of("w4a16", asymmetric=True, kv_cache=True), "a")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "mine.partial", "out"]


@contextmanager
def files_of_at_most(size):
    """As a disk without room for more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_a_model(sources, tmp_path):
    source, scheme, target = AutoModelForCausalLM.from_pretrained(sources["fp32"]), SCHEMES["w8a8"], tmp_path / "out"
    first, second = quantized_blocks(source, scheme)
    writer = ModelWriter(sources["fp32"], target, scheme, "a")
    with files_of_at_most(10_000), pytest.raises(UserError, match=r"out: cannot be written \(.*[^t]\)$"):
        add_block(writer, 0, *first)
    assert not list(tmp_path.iterdir())  # nothing to go on from
    writer = ModelWriter(sources["fp32"], target, scheme, "a")
    add_block(writer, 0, *first)
    with files_of_at_most(10_000), pytest.raises(UserError, match="goes on from the blocks"):
        add_block(writer, 1, *second)
    add_block(writer, 1, *second)
    with files_of_at_most(200_000), pytest.raises(UserError, match="goes on from the blocks"):
        writer.finish(outside_blocks(source), [])
    assert [one.name for one in tmp_path.iterdir()] == ["out.partial"]
    again = ModelWriter(sources["fp32"], target, scheme, "a")
    assert again.done() == 2
    again.finish(outside_blocks(source), [])
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_quantised_model_is_neither_trained_nor_quantised(sources, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(sources["fp32"])
    target = write_quantized(source, sources["fp32"], tmp_path / "out", SCHEMES["w8a8"])
    with pytest.raises(UserError, match=r"out: is quantised already \(compressed-tensors\); give the model in full"):
        ModelWriter(target, tmp_path / "twice", SCHEMES["w4a16"], "a")
    with pytest.raises(UserError, match=r"^model\.source: .*out: is quantised already"):
        check_weights(ModelConfig(source=str(target)))


def test_the_extra_is_named_where_the_package_is_missing(sources, tmp_path, monkeypatch):
    source = AutoModelForCausalLM.from_pretrained(sources["fp32"])
    target = write_quantized(source, sources["fp32"], tmp_path / "out", SCHEMES["w4a16"])
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r'run `pip install "calibtrain\[quantization\]"`'):
        load_model(ModelConfig(source=str(target), dtype="fp32"))
    with pytest.raises(UserError, match=r'run `pip install "calibtrain\[quantization\]"`'):
        ModelWriter(sources["fp32"], tmp_path / "new", SCHEMES["w4a16"], "a")


def test_conv1d_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    with pytest.raises(UserError, match=r"^GPT2LMHeadModel: transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        check_readable(model, SCHEMES["w4a16"])


def test_layers_that_engines_fuse_stay_together():
    layers = [f"model.layers.0.{one}" for one in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    layers += [f"model.layers.0.mlp.{one}_proj" for one in ("gate", "up", "down")]
    for ignored in ([], layers, layers[:3], layers[3:5], layers[5:]):
        check_ignored(layers, ignored)
    for ignored in (layers[1:2], layers[4:5], layers[2:5]):
        with pytest.raises(UserError, match=r"^--ignore: vLLM fuses (q|gate)_proj"):
            check_ignored(layers, ignored)


SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


def mixture(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=3, **SIZES)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=3, moe_intermediate_size=32, **SIZES)).eval()


@pytest.mark.parametrize("name", ["w4a16", "w8a16 asymmetric", "w8a8", "w4a16 asymmetric"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts(tmp_path, kind, name):
    model, scheme = mixture(kind), SCHEMES[name]
    if name != "w4a16":
        with pytest.raises(UserError, match="take w4a16, w8a16 or fp8"):
            check_readable(model, scheme)
        return
    check_readable(model, scheme)
    model.save_pretrained(tmp_path / "source")
    writer = ModelWriter(tmp_path / "source", tmp_path / "out", scheme, "a")
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        weights, fused = {}, fused_parameters(block, prefix)
        others = {prefix + key: one for key, one in block.named_parameters() if prefix + key not in fused}
        for layer, module in matrices_in(block, prefix).items():
            weights[layer] = quantize_weight(others.pop(f"{layer}.weight"), scheme.weights, scheme.group_size)
            module.weight.copy_(weights[layer].dequantized())
        weights |= quantize_experts(model, block, prefix, scheme)
        writer.add_block(index, weights, stored_names(model, others))
    writer.finish(outside_blocks(model), routers(model))
    router = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", f"model.layers.0.{router}", f"model.layers.1.{router}"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logprobs(loaded), logprobs(model))

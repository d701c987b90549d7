"""Two model directories as pairs of matrices: what modules compute with, whatever the files look like."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibtrain.errors import UserError
from calibtrain.spectral.directories import open_pairs
from calibtrain.spectral.written_models import write_model
from tests.tiny import tiny_model

transformers = pytest.importorskip("transformers")
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}


def save(model, path, **saving):
    model.save_pretrained(path, **saving)
    return path


def gpt2(seed, kind=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (kind or transformers.GPT2LMHeadModel)(transformers.GPT2Config(**GPT2))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """(base, tuned, model of base, model of tuned): untied, sharded differently."""
    folder = tmp_path_factory.mktemp("llamas")
    models = [tiny_model(seed=seed, tied=False) for seed in (0, 1)]
    base = save(models[0], folder / "base", max_shard_size="30KB")
    return base, save(models[1], folder / "tuned", max_shard_size="80KB"), *models


def check_against_modules(pairs, *models):
    """Each matrix times an input is what its module makes of it."""
    for pair in pairs:
        for matrix, model in zip(pair.read(), models, strict=True):
            module = model.get_submodule(pair.name.removesuffix(".weight"))
            assert tuple(matrix.shape) == pair.shape
            x = torch.randn(3, pair.shape[1], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                bias = 0 if module.bias is None else module.bias
                assert torch.allclose(x @ matrix.mT, module(x) - bias, atol=1e-5)


def test_matrices_are_those_of_the_linear_layers(llamas):
    base, tuned, *models = llamas
    assert len(list(base.glob("*.safetensors"))) > len(list(tuned.glob("*.safetensors"))) > 1
    found = open_pairs(base, tuned)
    assert [(pair.layer, pair.expert) for pair in found.pairs] == [(0, None)] * 7 + [(1, None)] * 7
    assert {pair.module for pair in found.pairs} == SEVEN
    assert dict(found.left_out).keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    check_against_modules(found.pairs, *models)
    pair = found.pairs[3]
    assert pair.dtype == "float32"
    assert pair.factors() is None


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_no_file_stays_mapped_after_reading(llamas):
    kept = [pair.read() for pair in open_pairs(*llamas[:2], modules=["q_proj", "embed_tokens"]).pairs]
    assert len(kept) == 3
    assert str(llamas[0].parent) not in Path("/proc/self/maps").read_text()


def test_conv1d_stores_the_transposed(tmp_path):
    models = [gpt2(seed) for seed in (0, 1)]
    base, tuned = (save(model, tmp_path / str(index)) for index, model in enumerate(models))
    pairs = open_pairs(base, tuned).pairs
    assert {pair.module for pair in pairs} == {"c_attn.q", "c_attn.k", "c_attn.v", "attn.c_proj", "mlp.c_proj", "c_fc"}
    check_against_modules([pair for pair in pairs if not pair.name.endswith("]")], *models)


def test_a_decoder_is_compared_with_the_model_around_it(tmp_path):
    decoder = save(gpt2(0, transformers.GPT2Model), tmp_path / "decoder")
    whole = save(gpt2(1), tmp_path / "whole")
    assert "h.0.attn.c_proj.weight" in load_file(decoder / "model.safetensors")
    for pair in (there := {pair.name: pair for pair in open_pairs(decoder, whole).pairs}).values():
        assert pair.name.startswith("transformer.h.")
    back = {f"transformer.{pair.name}": pair for pair in open_pairs(whole, decoder).pairs}
    assert back.keys() == there.keys()
    for name, pair in there.items():
        assert all(torch.equal(one, other) for one, other in zip(pair.read(), back[name].read()[::-1], strict=True))


def test_experts_have_numbers(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    base, tuned = save(model, tmp_path / "base"), save(transformers.Qwen3MoeForCausalLM(config), tmp_path / "tuned")
    apart = {(p.module, p.expert): p for p in open_pairs(base, tuned).pairs if p.expert is not None}
    assert apart.keys() == {
        (f"experts.{name}", expert) for name in ("gate_proj", "up_proj", "down_proj") for expert in range(3)
    }
    before = {key: pair.read()[0] for key, pair in apart.items()}
    for side in (base, tuned):  # as the modules hold them, in one tensor
        held = transformers.AutoModelForCausalLM.from_pretrained(side).state_dict()
        save_file(held, side / "model.safetensors", metadata={"format": "pt"})
    stacked = {(p.module, p.expert): p for p in open_pairs(base, tuned).pairs if p.expert is not None}
    assert "model.layers.0.mlp.experts.gate_up_proj[2][up]" in {pair.name for pair in stacked.values()}
    for (module, expert), matrix in before.items():
        name = {"experts.gate_proj": "experts.gate_up_proj.gate", "experts.up_proj": "experts.gate_up_proj.up"}
        other = stacked[name.get(module, module), expert]
        assert tuple(matrix.shape) == other.shape
        assert torch.equal(matrix, other.read()[0])
    assert len(open_pairs(base, tuned, modules=["experts"]).pairs) == 9
    assert len(open_pairs(base, tuned, modules=["gate_up_proj.up", "down_proj"]).pairs) == 6


def test_layers_and_modules_choose(llamas):
    base, tuned = llamas[:2]
    assert [pair.name for pair in open_pairs(base, tuned, layers={1}, modules=["q_proj"]).pairs] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    chosen = open_pairs(base, tuned, modules=["lm_head", "embed_tokens", "down_proj"])
    assert sorted(pair.module for pair in chosen.pairs) == ["down_proj", "down_proj", "embed_tokens", "lm_head"]
    assert chosen.left_out == []
    for wrong, line in (
        ({"layers": {0, 7}}, "no layer 7; there are layers 0-1"),
        ({"modules": ["q_proj", "w1"]}, "modules: w1 names no matrix; there are down_proj, embed_tokens, gate_proj"),
        ({"modules": ["proj"]}, "modules: proj names no matrix"),
        ({"modules": ["norm"]}, "modules: norm names no matrix"),
        ({"modules": ["lm_head"], "layers": {0}}, "no matrix of modules lm_head in layers 0"),
    ):
        with pytest.raises(UserError, match=line):
            open_pairs(base, tuned, **wrong)


def test_a_tied_head_is_named(llamas, tmp_path):
    untied = llamas[1]
    tied = save(tiny_model(tied=True), tmp_path / "tied")
    why = dict(open_pairs(tied, untied).left_out)
    assert why["lm_head.weight"] == f"tied to the embedding in {tied}"
    assert dict(open_pairs(untied, tied).left_out)["lm_head.weight"] == why["lm_head.weight"]
    other = save(tiny_model(tied=True, seed=3), tmp_path / "other")
    for base, tuned in ((tied, untied), (untied, tied), (tied, other)):
        with pytest.raises(UserError, match=r"modules: lm_head cannot be compared .*tied"):
            open_pairs(base, tuned, modules=["lm_head"])


def test_a_tied_embedding_may_lie_under_the_name_of_the_head(tmp_path):
    from safetensors.torch import save_model

    models = [tiny_model(tied=True, seed=seed) for seed in (0, 1)]
    base, tuned = (save(model, tmp_path / str(index)) for index, model in enumerate(models))
    save_model(models[0], str(base / "model.safetensors"))
    assert "model.embed_tokens.weight" not in load_file(base / "model.safetensors")
    for first, second in ((base, tuned), (tuned, base)):
        assert "model.embed_tokens.weight" in dict(open_pairs(first, second).left_out)
        (pair,) = open_pairs(first, second, modules=["embed_tokens"]).pairs
        for matrix, model in zip(pair.read(), models if first == base else models[::-1], strict=True):
            assert torch.equal(matrix, model.lm_head.weight)
        write_model(first, second, tmp_path / "out", lambda pair, before, after: before, modules=["embed_tokens"])
        written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(written.lm_head.weight, pair.read()[0])
        shutil.rmtree(tmp_path / "out")


def test_a_resized_vocabulary_is_left_out(llamas, tmp_path):
    larger = save(tiny_model(vocab_size=410, tied=False), tmp_path / "larger")
    found = open_pairs(llamas[0], larger)
    assert len(found.pairs) == 14
    assert dict(found.left_out)["lm_head.weight"] == f"410 rows, and 400 in {llamas[0]} (a resized vocabulary)"
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: 410 rows, and 400 in .* leave it out of modules"):
        open_pairs(llamas[0], larger, modules=["embed_tokens"])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["llama", "rslora and patterns", "gpt2", "embedding", "saved"])
def test_an_adapter_is_what_merging_it_gives(tmp_path, kind):
    peft = pytest.importorskip("peft")
    settings = {
        "llama": {"target_modules": ["q_proj", "down_proj"]},
        "rslora and patterns": {
            "target_modules": ["q_proj", "down_proj", "k_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "model.layers.1.mlp.down_proj": 5},
        },
        "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    model = gpt2(0) if kind == "gpt2" else tiny_model(tied=False)
    base = save(model, tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    adapter = save(model, tmp_path / "adapter")
    merged = save(model.merge_and_unload(), tmp_path / "merged")
    extra = {"embedding": ["embed_tokens", "o_proj"], "saved": ["lm_head", "q_proj"]}.get(kind)
    found, full = (
        open_pairs(base, adapter, modules=extra),
        {p.name: p for p in open_pairs(base, merged, modules=extra).pairs},
    )
    assert len(found.pairs) == {"llama": 4, "rslora and patterns": 6, "gpt2": 10}.get(kind, 3)
    for pair in found.pairs:
        assert torch.allclose(pair.read()[1], full[pair.name].read()[1], atol=1e-5)
        assert (full[pair.name].read()[1] - full[pair.name].read()[0]).abs().max() > 1e-2
        if pair.module == "lm_head":
            assert pair.factors() is None
            continue
        left, right = pair.factors()
        assert left.shape[1] == right.shape[0] in (2, 3, 4)
        assert torch.allclose(left @ right, pair.read()[1] - pair.read()[0], atol=1e-5)
        assert pair.dtype == "float32"
    if kind == "llama":
        assert "the adapter does not change it" in dict(found.left_out)["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"peft_type": "OFT"}, "a OFT adapter, and only LoRA is read in closed form; merge it first"),
        ({"use_dora": True}, "an adapter with use_dora"),
        ({"target_parameters": ["experts.down_proj"]}, "an adapter with target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changed the base model"),
        ({"lora_alpha": "much"}, "lora_alpha"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(llamas, tmp_path, settings, line):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, **settings}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=line):
        open_pairs(llamas[0], tmp_path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def rename_weights(path, name):
    for file in path.glob("model*.safetensors*"):
        file.unlink()
    (path / name).write_bytes(b"")


def cut(path):
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def overwrite(path):
    sorted(path.glob("*.safetensors"))[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


BROKEN = {
    "no such directory": shutil.rmtree,
    "no config.json and no adapter_config.json": lambda path: (path / "config.json").unlink(),
    r"holds no weights \(\*.safetensors\)": lambda path: [file.unlink() for file in path.glob("model*")],
    r"model-00001-of-\d+.safetensors: missing, and model.safetensors.index.json names it": lambda path: sorted(
        path.glob("*.safetensors")
    )[0].unlink(),
    "the index of its shards is missing": lambda path: (path / "model.safetensors.index.json").unlink(),
    r"holds no \S+, which model.safetensors.index.json puts there": lambda path: edit_tensors(
        path, lambda t: t.popitem()
    ),
    r"model-00001-of-\d+.safetensors: no whole safetensors file": cut,
    r"model-00001-of-\d+.safetensors: no whole safetensors file \(.*\); copy or download": overwrite,
    "is not the name of a file beside it": lambda path: edit_json(
        path / "model.safetensors.index.json", weight_map={"a": "../base/model.safetensors"}
    ),
    "has no weight_map": lambda path: edit_json(path / "model.safetensors.index.json", weight_map=[]),
    "config.json: cannot be read as JSON": lambda path: (path / "config.json").write_text("{"),
    r"only safetensors are read; load it with from_pretrained and": lambda path: rename_weights(
        path, "pytorch_model.bin"
    ),
    r"its weights are \*.gguf": lambda path: rename_weights(path, "model.gguf"),
    r"quantised \(bitsandbytes in config.json\)": lambda path: edit_json(
        path / "config.json", quantization_config={"quant_method": "bitsandbytes"}
    ),
    r"quantised \(\S+ is F8_E4M3\)": lambda path: edit_tensors(
        path, lambda t: t.update({name: one.to(torch.float8_e4m3fn) for name, one in t.items()})
    ),
    r"quantised \(\S+ is I32\)": lambda path: edit_tensors(
        path, lambda t: t.update({name: one.to(torch.int32) for name, one in t.items()})
    ),
    r"holds a model and an adapter": lambda path: (path / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_directory_is_one_clear_line(llamas, tmp_path, line):
    tuned = shutil.copytree(llamas[1], tmp_path / "tuned")
    BROKEN[line](tuned)
    with pytest.raises(UserError, match=line) as caught:
        open_pairs(llamas[0], tuned)
    assert str(tuned) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "adapter" not in line:
        with pytest.raises(UserError, match=line):
            open_pairs(tuned, llamas[0])


def test_two_architectures_are_refused(llamas, tmp_path):
    other = save(gpt2(0), tmp_path / "gpt2")
    with pytest.raises(
        UserError, match=r"of 8 weights in the layers of \S+ 0 match \S+base; transformer.h.0.attn.c_attn"
    ):
        open_pairs(llamas[0], other)
    deeper = save(tiny_model(layers=3, tied=False), tmp_path / "deeper")
    with pytest.raises(UserError, match=r"of 21 .* 14 match .*layers.2.\S+ is in \S+deeper and not in \S+base"):
        open_pairs(llamas[0], deeper)
    with pytest.raises(UserError, match=r"of 14 .* 14 match .*layers.2.\S+ is in \S+deeper and not in \S+base"):
        open_pairs(deeper, llamas[0])
    wider = save(tiny_model(tied=False, intermediate_size=80), tmp_path / "wider")
    with pytest.raises(
        UserError, match=r"of 14 .* 8 match .*_proj.weight is \[\d+, \d+\] in \S+base and \[\d+, \d+\] in"
    ):
        open_pairs(llamas[0], wider)
    with pytest.raises(UserError, match="the same directory twice"):
        open_pairs(llamas[0], llamas[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reading_names_the_file_of_a_broken_weight(llamas, tmp_path, value):
    tuned = shutil.copytree(llamas[1], tmp_path / "tuned")
    names = []

    def spoil(tensors):
        names.append(next(name for name in tensors if "q_proj" in name or "down_proj" in name))
        tensors[names[0]][1, 2] = value

    file = edit_tensors(tuned, spoil)
    pairs = {pair.name: pair for pair in open_pairs(llamas[0], tuned).pairs}
    line = rf"{re.escape(str(file))}: 1 of \d+ values of {names[0]} are NaN or infinite"
    with pytest.raises(UserError, match=line):
        pairs.pop(names[0]).read()
    for pair in pairs.values():
        pair.read()
    file.unlink()
    with pytest.raises(UserError, match="cannot read"):
        [pair.read() for pair in pairs.values()]


def test_unknown_tensors_are_named_and_not_compared(llamas, tmp_path):
    tuned = shutil.copytree(llamas[1], tmp_path / "tuned")
    unknown = {
        "v_head.weight": torch.ones(1, 32),
        "model.layers.0.conv.weight": torch.ones(4, 1, 3),
        "0": torch.ones(2, 2),
    }
    save_file(load_all(tuned) | unknown, tuned / "model.safetensors")
    found = open_pairs(llamas[0], tuned)
    assert len(found.pairs) == 14
    assert dict(found.left_out)["v_head.weight"] == f"only in {tuned}"
    assert unknown.keys() <= dict(found.left_out).keys()


def test_modules_of_one_name_in_a_layer_are_told_apart(tmp_path):
    names = [f"{tower}.layers.{layer}.attn.{name}" for tower in ("vision", "text") for layer in (0, 1) for name in "qv"]
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.json").write_text("{}")
        save_file({f"{name}.weight": torch.ones(3, 3) for name in [*names, "text.layers.1.mlp.up"]},
                  tmp_path / side / "model.safetensors")  # fmt: skip
    pairs = open_pairs(tmp_path / "base", tmp_path / "tuned").pairs
    towers = {f"{tower}.layers.attn.{name}" for tower in ("vision", "text") for name in "qv"}
    assert {pair.module for pair in pairs} == {*towers, "up"}
    assert len({(pair.layer, pair.module) for pair in pairs}) == len(pairs) == 9


def load_all(path):
    return {name: one for file in path.glob("*.safetensors") for name, one in load_file(file).items()}

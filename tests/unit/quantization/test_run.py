"""Whole directories quantised: every scheme and method, where a run goes on, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models.loading import load_model
from calibtrain.quantization import run
from calibtrain.quantization.blocks import Text
from calibtrain.quantization.run import METHODS, Settings, quantize_directory
from calibtrain.quantization.schemes import scheme_of
from tests.tiny import tiny_model, tiny_tokenizer

GROUPED = scheme_of("w4a16", group_size=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model"
    model = tiny_model(hidden=64, layers=3)
    with torch.no_grad():
        for one in model.parameters():  # far from the initial 0.02, so that rounding shows in the logits
            if one.ndim == 2:
                one.mul_(4)
    model.to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (40, 2), generator=generator).tolist()
    draw = lambda n: torch.randint(5, 400, (n,), generator=generator).tolist()  # noqa: E731
    return [Text(draw(prompt), draw(answer // 3)) for prompt, answer in lengths]


def logits_of(path):
    model = load_model(ModelConfig(source=str(path)))
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize(
    "scheme",
    [
        GROUPED,
        scheme_of("w4a16", group_size=64, asymmetric=True),
        scheme_of("w8a16"),
        scheme_of("w8a8"),
        scheme_of("w8a8", static=True),
        scheme_of("fp8", kv_cache=True),
    ],
    ids=lambda one: one.label,
)
@pytest.mark.parametrize("method", METHODS)
def test_every_scheme_by_every_method_loads_and_stays_near(source, texts, tmp_path, scheme, method):
    facts = quantize_directory(source, tmp_path / "q", texts, Settings(scheme, method))
    wanted, found = logits_of(source), logits_of(tmp_path / "q")
    error = float((found - wanted).square().mean() / wanted.square().mean())
    assert 0 < error < (0.1 if scheme.weights.bits == 4 else 0.02)
    assert json.loads(json.dumps(facts))["method"] == method
    assert not (tmp_path / "q.partial").exists()


def test_groups_that_do_not_divide_a_width_are_made_smaller_and_that_is_told(source, texts, tmp_path):
    facts = quantize_directory(source, tmp_path / "q", texts, Settings(scheme_of("w4a16"), "minmax"))
    assert (facts["asked_group_size"], facts["scheme"]["group_size"]) == (128, 64)


def test_matching_disturbs_answers_less_than_rounding_to_nearest(source, texts, tmp_path):
    def divergence(path):
        p, q = (logits_at_answers(one, texts) for one in (source, path))
        return float((p.exp() * (p - q)).sum(-1).mean())

    for method in ("minmax", "preserve"):
        quantize_directory(source, tmp_path / method, texts, Settings(GROUPED, method))
    assert divergence(tmp_path / "preserve") < 0.5 * divergence(tmp_path / "minmax")


def logits_at_answers(path, texts):
    model, found = load_model(ModelConfig(source=str(path))), []
    with torch.no_grad():
        for one in texts:
            logits = model(input_ids=torch.tensor([[*one.prompt, *one.answer]])).logits[0]
            found.append(logits[len(one.prompt) - 1 : -1].float().log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("method", ["smoothquant", "preserve"])
def test_an_interrupted_run_goes_on_and_ends_alike(source, texts, tmp_path, method):
    settings = Settings(scheme_of("w8a8", static=True), method)
    quantize_directory(source, tmp_path / "whole", texts, settings)

    class Stop(Exception):
        pass

    def stop(done, of):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        quantize_directory(source, tmp_path / "q", texts, settings, on_block=stop)
    assert not (tmp_path / "q").exists()
    blocks = []
    quantize_directory(source, tmp_path / "q", texts, settings, on_block=lambda done, of: blocks.append(done))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_blocks_of_other_texts_are_not_gone_on_from(source, texts, tmp_path, monkeypatch):
    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_directory(source, tmp_path / "q", texts, Settings(GROUPED, "awq"), on_block=stop)
    done = []
    monkeypatch.setattr(run, "_restore", lambda *args: done.append(args))
    quantize_directory(source, tmp_path / "q", texts[:-1], Settings(GROUPED, "awq"))
    assert done == []


def test_what_is_ignored_stays(source, texts, tmp_path):
    settings = Settings(GROUPED, "preserve", ignore=("down_proj", "model.layers.0.self_attn.o_proj"))
    facts = quantize_directory(source, tmp_path / "q", texts, settings)
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"} <= set(ignored)
    assert "model.layers.1.mlp.down_proj" in facts["full_precision"]


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_quantised_too(texts, tmp_path, method):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=400, num_key_value_heads=1, num_local_experts=4, initializer_range=0.1, **sizes)
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    for _ in range(2):  # what an interrupted run left is not gone on from
        quantize_directory(tmp_path / "moe", tmp_path / "q", texts, Settings(GROUPED, method))
        names = safe_open(tmp_path / "q" / "model.safetensors", "pt").keys()
        assert any("experts.1." in name and name.endswith("weight_packed") for name in names)
        assert not any(name.endswith("gate_up_proj") for name in names)
        models = [load_model(ModelConfig(source=str(tmp_path / one))) for one in ("moe", "q")]
        ids = torch.arange(4, 24)[None]
        with torch.no_grad():
            wanted, found = (one(input_ids=ids).logits.float() for one in models)
        assert 0 < float((found - wanted).square().mean() / wanted.square().mean()) < 0.15
        shutil.rmtree(tmp_path / "q")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Settings(GROUPED, "magic"), "--method: 'magic' is none of minmax, smoothquant, awq, preserve"),
        (Settings(GROUPED, "minmax", ignore=("q_projj",)), "no layer is called 'q_projj'; there are q_proj"),
        (Settings(GROUPED, "minmax", ignore=("re:.*",)), "leaves no layer to quantise"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(source, texts, tmp_path, settings, says):
    with pytest.raises(UserError, match=says.replace("*", r"\*")):
        quantize_directory(source, tmp_path / "q", texts, settings)
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_no_group_divides_is_told_by_name(texts, tmp_path):
    tiny_model(hidden=48, layers=2).save_pretrained(tmp_path / "odd")
    tiny_tokenizer().save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"model.layers.0.self_attn.q_proj: no group of 128 or 64 or 32 divides its 48"):
        quantize_directory(tmp_path / "odd", tmp_path / "q", texts, Settings(scheme_of("w4a16"), "minmax"))


def test_a_quantised_model_is_not_quantised_again(source, texts, tmp_path):
    quantize_directory(source, tmp_path / "q", texts, Settings(GROUPED, "minmax"))
    with pytest.raises(UserError, match="quantised"):
        quantize_directory(tmp_path / "q", tmp_path / "again", texts, Settings(GROUPED, "minmax"))


def test_a_broken_model_is_told_by_layer(source, texts, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    for method in METHODS:
        with pytest.raises(UserError, match="NaN or infinite"):
            quantize_directory(tmp_path / "broken", tmp_path / "q", texts, Settings(scheme_of("w8a8"), method))
        assert not (tmp_path / "q").exists()

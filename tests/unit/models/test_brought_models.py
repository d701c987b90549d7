"""Models that people bring: what loading, adapters and the export make of them, or refuse before the start."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import calibtrain
from calibtrain.config import ModelConfig, RunConfig
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.export import export_model
from calibtrain.models.loading import (
    LEARNED_POSITIONS,
    answering_config,
    cause,
    check_positions,
    check_weights,
    load_model,
    load_settings,
    load_tokenizer,
)
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline import train
from tests.tiny import tiny_tokenizer, write_tiny_model

IDS = torch.arange(20, 40)[None]


def lora(path, targets):
    return ModelConfig(source=str(path), dtype="fp32", lora={"r": 4, "target_modules": targets})


def adapter(path, kind, targets, **settings):
    return ModelConfig(source=str(path), dtype="fp32", adapter={"kind": kind, "target_modules": targets, **settings})


def test_a_tokenizer_that_outgrows_the_embedding_is_refused(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    rows = load_settings(ModelConfig(source=str(path))).vocab_size
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=rf"token {rows} \('<\|new\|>'\).* {rows} tokens alone"):
        load_tokenizer(ModelConfig(source=str(path)))


def test_a_placeholder_of_a_multimodal_family_is_told(tmp_path, caplog):
    path = write_tiny_model(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(path)
    load_tokenizer(ModelConfig(source=str(path)))
    assert "<image_soft_token>" in caplog.text


def test_padded_embeddings_are_fine(tmp_path):
    from tests.tiny import tiny_model

    path = write_tiny_model(tmp_path / "m")
    tiny_model(512).save_pretrained(path)
    load_tokenizer(ModelConfig(source=str(path)))


def test_a_table_of_positions_bounds_max_length(tmp_path):
    from transformers import GPT2Config

    assert "gpt2" in LEARNED_POSITIONS
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    check_positions(ModelConfig(source=str(tmp_path)), 64)
    with pytest.raises(UserError, match=r"data.max_length: 65, but .* has 64 positions"):
        check_positions(ModelConfig(source=str(tmp_path)), 65)


@pytest.mark.parametrize(
    ("tied", "targets", "words"),
    [
        (True, ["q_proj", "lm_head"], "'lm_head' is the language-model head"),
        (False, ["lm_head"], "'lm_head' is the language-model head"),
        (True, ["q_proj", "embed_tokens"], "'embed_tokens' is tied to the head"),
        (False, ["q_proj", "query"], "no layer is called 'query'; there are q_proj"),
        (False, ["input_layernorm"], "target_modules"),
        (False, ["mlp"], "target_modules"),
    ],
)
def test_adapters_that_would_not_move_are_refused(tmp_path, tied, targets, words):
    path = write_tiny_model(tmp_path / "m", tied=tied)
    with pytest.raises(UserError, match=words):
        load_model(lora(path, targets))
    for kind in ("oft", "shared_rotation"):
        with pytest.raises(UserError, match="target_modules"):
            load_model(adapter(path, kind, targets))


def test_blocks_must_divide_the_inputs(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    with pytest.raises(UserError, match=r"block_size: 24 does not divide the 32 inputs of q_proj"):
        load_model(adapter(path, "oft", "all-linear", block_size=24))


ADAPTED = {
    "lora": lambda path: lora(path, ["q_proj", "mlp.down_proj"]),
    "lora of all": lambda path: lora(path, "all-linear"),
    "lora of untied embeddings": lambda path: lora(path, ["embed_tokens", "q_proj"]),
    "oft": lambda path: adapter(path, "oft", ["self_attn.q_proj"], block_size=8),
    "shared rotation": lambda path: adapter(path, "shared_rotation", ["self_attn.q_proj", "down_proj"], rank=4),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_every_adapter_moves_and_is_exported_as_trained(kind, tmp_path):
    config = ADAPTED[kind](write_tiny_model(tmp_path / "m", tied=False))
    policy = Policy(load_model(config)).train()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = [parameter.detach().clone() for parameter in trained]

    def nll(model):
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss

    for _ in range(3):
        optimizer.zero_grad()
        nll(policy.causal_model).backward()
        optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, trained, strict=True))
    policy.eval()
    tokenizer = load_tokenizer(config)
    export_model(policy, config, tokenizer, tmp_path / "out")
    exported = load_model(ModelConfig(source=str(tmp_path / "out"), dtype="fp32"))
    with torch.no_grad():
        torch.testing.assert_close(nll(exported), nll(policy.causal_model), rtol=1e-4, atol=1e-4)


def export(path, target, end_id=None):
    config = ModelConfig(source=str(path), dtype="fp32")
    policy, tokenizer = Policy(load_model(config)), load_tokenizer(config)
    export_model(policy, config, tokenizer, target, end_id=end_id)
    return json.loads((target / "generation_config.json").read_text())


def test_the_export_stops_where_answers_ended_in_training_and_keeps_the_rest(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    source = {"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(source))
    found = export(path, tmp_path / "out", end_id=1)
    assert found == source | {"eos_token_id": [2, 7, 1]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert export(path, tmp_path / "two", end_id=1)["eos_token_id"] == [2, 1]
    (path / "generation_config.json").unlink()
    assert export(path, tmp_path / "none", end_id=1)["eos_token_id"] == 1


def test_a_finished_run_is_loaded_as_it_was_trained():
    other = {
        "source": "owner/name", "revision": "abc", "trust_remote_code": True, "dtype": "fp32", "attention": "eager",
        "gradient_checkpointing": True, "compile": True, "lora": {"r": 4},
    }  # fmt: skip
    config = ModelConfig(**other)
    found = answering_config(config, Path("out/model"))
    own = {"source": "out/model", "revision": None, "lora": None, "gradient_checkpointing": False, "compile": False}
    # A key that is added to the config is carried over, whatever it is.
    assert found == config.model_copy(update=own)
    assert answering_config(config).source == "owner/name"
    assert answering_config(config).revision == "abc"


def test_gemma2_with_eager_attention_is_loaded_with_it(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from calibtrain.pipeline.evaluate import Loaded

    tokenizer = tiny_tokenizer()
    settings = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_logit_softcapping=1.0, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = RunConfig(model={"source": "owner/name", "dtype": "fp32", "attention": "eager"})
    loaded = Loaded(config, tmp_path)
    assert loaded.model.policy.model.config._attn_implementation == "eager"


def _calls(text: str, function: str, keyword: str) -> bool:
    """True where the code itself, not a text within it, makes such a call."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == function]
    return any(keyword in [word.arg for word in call.keywords] for call in named)


def test_only_one_place_says_how_a_finished_run_is_loaded():
    root = Path(calibtrain.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    assert [name for name, text in sources.items() if _calls(text, "ModelConfig", "source")] == []
    made = {name for name, text in sources.items() if " Template(" in text or "=Template(" in text}
    assert made <= {"data/templates.py", "data/reward_text.py", "hooks/callback.py"}, (
        "take template_of, which knows all of data's keys"
    )


def test_the_head_is_checked_where_the_engine_runs(tmp_path, monkeypatch):
    """Some attention runs on GPUs alone, and weights in parts are brought within the engine's forward alone."""
    path = write_tiny_model(tmp_path / "m")
    seen = []

    class Module(LossModel):
        def forward(self, step):
            seen.append("in")
            found = super().forward(step)
            seen.append("out")
            return found

    def start(model, config, world):
        model.__class__ = Module
        return SimpleNamespace(module=model)

    monkeypatch.setattr(train, "start_engine", start)
    monkeypatch.setattr(train, "check_head", lambda policy: seen.append(f"check on {next(policy.parameters()).device}"))
    monkeypatch.setattr(train, "row_layout", lambda config, policy: {})
    config = RunConfig(model={"source": str(path), "dtype": "fp32"}, training={"zero_stage": 2})
    template = Template("plain", tiny_tokenizer())
    train.begin_engine(config, template, World(0, 1, 0, torch.device("meta")))
    assert seen == ["in", "check on meta", "out", "in", "out"]


def test_a_refused_attention_names_the_key_that_mends_it():
    theirs = ValueError('Gemma2 does not support SDPA. Load with `attn_implementation="eager"`: e.g. a long example')
    assert cause(theirs) == "Gemma2 does not support SDPA; set model.attention, e.g. to eager"
    assert cause(ValueError("attention_bias is odd. More\nrest")) == "attention_bias is odd. More"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
PARTS = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: POINTER])
def test_damaged_weights_are_a_users_mistake_and_told_before_the_start(tmp_path, damage):
    file = write_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    config = ModelConfig(source=str(tmp_path), dtype="fp32")
    for load in (check_weights, load_model, lambda one: load_model(one, PARTS)):
        with pytest.raises(UserError, match=r"model.source: cannot load .*damaged or not all there.*git lfs pull"):
            load(config)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_a_users_mistake(tmp_path, index):
    (write_tiny_model(tmp_path) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model.source: cannot load"):
        load_model(ModelConfig(source=str(tmp_path), dtype="fp32"), PARTS)

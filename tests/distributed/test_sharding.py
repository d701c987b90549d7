"""Weights in parts from the start, on four ranks: what from_pretrained loads, each rank reading its own quarter."""

import json
import shutil

import pytest
import torch

from tests.distributed.ranks import forked, run
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RANKS = 4
MODELS = ("tied", "untied", "several_files", "conv1d", "experts", "soft_caps")


def write_models(folder):
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MixtralConfig,
        MixtralForCausalLM,
    )

    write_tiny_model(folder / "tied")
    write_tiny_model(folder / "untied", tied=False, attention_bias=True)
    tokenizer = tiny_tokenizer()
    words = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "conv1d": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **words)),
        "experts": MixtralForCausalLM(
            MixtralConfig(num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2, **sizes, **words)
        ),
        "soft_caps": Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, head_dim=8, **sizes, **words)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "untied").save_pretrained(
        folder / "several_files", max_shard_size="40KB"
    )
    tokenizer.save_pretrained(folder / "several_files")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_models(folder / "models")
    shutil.copytree(folder / "models" / "tied", folder / "other_shape")
    settings = json.loads((folder / "other_shape" / "config.json").read_text())
    (folder / "other_shape" / "config.json").write_text(json.dumps(settings | {"intermediate_size": 65}))
    script = str(__file__).replace("test_sharding", "sharding_cases")
    ended = run(forked(RANKS, script, str(folder)), folder)
    assert ended.code == 0, ended.output[-6000:]
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_read_in_parts_is_the_one_that_is_read_whole(results, name, dtype):
    for found in results["loaded"][name, dtype]:
        assert found["names"]
        assert found["all in parts"]
        assert found["differing"] == []
        assert found["held"] == pytest.approx(1 / RANKS, rel=0.01)
        assert found["gap"] == 0.0
        assert found["same draws after it"]
        assert found["eval"]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_token_is_added_to_weights_in_parts(results, name):
    found = results["token"][name]
    names = [one.removeprefix("whole ") for one in found if one.startswith("whole")]
    assert len(names) == {"tied": 1, "untied": 2}[name]
    assert all(found[f"whole {one}"].equal(found[f"parts {one}"]) for one in names)


def test_weights_of_another_shape_than_the_config_says_are_refused_by_name(results):
    assert "other_shape" in results["refused"]
    assert "mlp.down_proj.weight is [32, 64] in its files, and its config.json makes it [32, 65]" in results["refused"]

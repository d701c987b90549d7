"""Ranks that share rows learn what one learns: losses, gradients, metrics, a resumed run; and who cannot share is told."""

import json

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.models.loading import load_settings
from calibtrain.models.sequence_parallel import check_sharing
from tests.distributed.jobs import metrics, write_job
from tests.distributed.ranks import run, torchrun
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
CASES = ("long", "pairs", "packed", "early", "nothing", "qwen", "checkpointed", "lengths", "window")


def write_models(folder):
    """A Llama, a Qwen 3 with two key-value heads for four heads, and a Mistral with a window of eight tokens."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    write_tiny_model(folder / "llama", max_position_embeddings=2048)
    sizes = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder / "qwen")
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=8)).save_pretrained(folder / "mistral")
    for name in ("qwen", "mistral"):
        tiny_tokenizer().save_pretrained(folder / name)


def launch(folder, ranks, *configs):
    script = str(__file__).replace("test_sequence_parallel", "sequence_cases")
    ended = run(torchrun(ranks, script, str(folder), *map(str, configs)), folder)
    assert ended.code == 0, ended.output[-6000:]
    return json.loads((folder / f"passes-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Passes on two ranks, and whole runs of the same batches: each rank its own, rows shared, and gone on with."""
    folder = tmp_path_factory.mktemp("sequence")
    write_models(folder)
    training = {"zero_stage": 3, "max_steps": 3, "checkpoint_every": 2, "evaluate_loss_every": 2}
    splits = {"train": 40, "calibration": 8, "validation": 7, "temperature": 8, "certification": 8, "test": 8}
    asked = {"refresh_every": 2, "questions_per_refresh": 5}
    # A memory of fewer answers than a step has: one that held some twice would hold others.
    in_loss = [{"name": "answer_score", "moves": "all", **asked}, {"name": "mmce", "bank_size": 4, **asked}]
    job = {"penalties": in_loss, "data": {"splits": splits}}
    two = {"sequence_parallel_size": 2}
    configs = (
        write_job(
            folder,
            "one",
            objective={"name": "kto"},
            penalties=[],
            data={"splits": splits},
            training={**training, **two, "global_batch_size": 1},
        ),
        write_job(folder, "apart", **job, training=training),
        write_job(folder, "shared", **job, training={**training, **two}),
    )
    found = launch(folder, 2, *configs)
    return folder, found


@pytest.mark.parametrize("name", CASES)
def test_a_shared_micro_batch_gives_the_gradient_of_a_whole_one(shared, name):
    check_passes(shared[1][name])
    assert (shared[1][name]["length"] > 0) == (name != "nothing")


def check_passes(found):
    assert found["gradients"] < 1e-6
    assert found["logprobs"] < 1e-5
    assert found["alone"] < 1e-6  # what generates and measures passes rows whole
    assert found["correct"]
    for whole, parts in found["terms"].values():
        assert parts == pytest.approx(whole, rel=1e-6)


def test_in_bf16_it_differs_by_rounding(shared):
    found = shared[1]["bf16"]
    assert found["gradients"] < 0.05
    assert found["length"] > 0


def test_a_whole_run_logs_and_writes_what_separate_ranks_do(shared):
    folder = shared[0]
    apart, together = (metrics(folder / name) for name in ("apart", "shared"))
    assert len(apart) == len(together) > 3
    for one, other in zip(apart, together, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key in ("train/tflops_per_second_and_device", "train/mfu"):
                continue  # by the clock
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert any(line.get("train/token/n") for line in apart)  # counted once, whoever shares them
    assert any("eval/loss" in line for line in apart)
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in ("apart", "shared")]
    for name, one in weights[0].items():
        assert torch.allclose(weights[1][name], one, rtol=1e-4, atol=1e-6), name


def test_a_group_may_have_fewer_records_than_ranks(shared):
    """KTO reads the step's mismatched answers beside the loss: in as many passes on each rank, or ZeRO-3 waits for ever."""
    assert [line["step"] for line in metrics(shared[0] / "one") if line["event"] == "log"] == [1, 2, 3]


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(shared):
    unbroken, resumed = (load_file(shared[0] / name / "model" / "model.safetensors") for name in ("shared", "again"))
    assert all(torch.equal(resumed[name], one) for name, one in unbroken.items())


@pytest.mark.slow
def test_two_ranks_may_read_one_head_of_keys(shared):
    for name, found in launch(shared[0], 4).items():
        if name != "bf16":
            check_passes(found)


@pytest.mark.parametrize(
    ("heads", "keys", "size", "told"),
    [(4, 2, 3, "take one of 1, 2, 4"), (6, 2, 8, "take one of 1, 2, 6"), (9, 3, 2, "take one of 1, 3, 9")],
)
def test_heads_that_do_not_go_round_are_told_before_anything_is_loaded(tmp_path, heads, keys, size, told):
    write_tiny_model(
        tmp_path / "m", num_attention_heads=heads, num_key_value_heads=keys, hidden=8 * heads, intermediate_size=16
    )
    config = RunConfig.model_validate({"model": {"source": str(tmp_path / "m")}})
    with pytest.raises(UserError, match=told):
        check_sharing(load_settings(config.model), size, 64)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": {"name": "reward_model"}}, "trains a reward head"),
        ({"objective": {"name": "ppo"}}, "trains a value head"),
        ({"confidence_head": {}}, "confidence_head reads the states"),
        ({"model": {"attention": "eager"}}, "take sdpa or flash_attention_2"),
        ({"model": {"compile": True}, "training": {"zero_stage": 2}}, "model.compile"),
    ],
)
def test_what_reads_whole_rows_is_refused_by_its_config(changes, told):
    training = {"sequence_parallel_size": 2, **changes.pop("training", {})}
    with pytest.raises(ValueError, match=told):
        RunConfig.model_validate({"training": training, **changes})


def test_models_with_rules_of_their_own_are_refused(tmp_path):
    from transformers import LlamaConfig, MistralConfig

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for settings, told in (
        (MistralConfig(sliding_window=32), "window"),
        (LlamaConfig(rope_parameters=rope), "has a rope"),
    ):
        with pytest.raises(UserError, match=told):
            check_sharing(settings, 2, 64)
        check_sharing(settings, 1, 64)
    check_sharing(MistralConfig(sliding_window=32), 2, 64, "flash_attention_2")
    check_sharing(MistralConfig(sliding_window=32), 2, 32)

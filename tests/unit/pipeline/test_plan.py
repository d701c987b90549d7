"""Plans from a config.json alone: what is counted is what torch holds, and what fits is what was asked to fit."""

import json

import pytest
import torch
from typer.testing import CliRunner

from calibtrain.cli import app
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.models.cost import DEVICES
from calibtrain.models.loading import load_model
from calibtrain.pipeline.plan import ROOM, make_plan, ways
from calibtrain.pipeline.plan_memory import (
    DEVICE,
    HOST,
    Activations,
    activations,
    counted,
    memory_estimate,
    model_size,
    phases,
    rows_of,
    saved_bytes,
    total,
)
from calibtrain.pipeline.plan_time import Cluster, step_time
from calibtrain.training.deepspeed_config import batch_plan
from tests.tiny import write_tiny_model

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "max_position_embeddings": 8192, "vocab_size": 128256, "num_key_value_heads": 8}  # fmt: skip
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496}  # as the models' cards have them


def cluster(gpus=8, gib=80, nodes=1, link="nvlink", device="h100"):
    return Cluster(gpus, gib, nodes, link, DEVICES[device])


def written(folder, size):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **SIZES[size]}))
    return folder


def config(source, **changes):
    overrides = {"max_length": 2048, **changes.pop("data", {})}
    training = {"global_batch_size": 64, "micro_batch_size": 1, **changes.pop("training", {})}
    model = {"source": str(source), "dtype": "bf16", **changes.pop("model", {})}
    return RunConfig.model_validate(
        {"model": model, "data": overrides, "training": training, "objective": {"name": "sft"},
         "evaluation": {"batch_size": 8}, **changes}
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "lora"), [("fp32", None), ("bf16", {"r": 4})])
def test_activations_are_those_of_a_forward_pass(tmp_path, dtype, lora):
    source = write_tiny_model(tmp_path / "m", layers=3)
    one = config(source, model={"dtype": dtype, "lora": lora}, data={"max_length": 64})
    model = load_model(one.model).train()
    model.set_attn_implementation("sdpa")  # bf16 has another on CPUs
    inner = model.get_base_model() if lora else model
    with counted(model) as seen:
        inner.base_model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False)
    expected = sum(seen.values())
    planned = activations(one, 64).of(2, 3, checkpointing=False)
    assert planned == pytest.approx(expected, rel=0.03)  # some are of a batch, whatever its rows
    assert saved_bytes(one.model, 2, 64, 3) == pytest.approx(expected, rel=0.001)


def test_checkpointing_keeps_one_layer():
    one = config("embedded:smollm2-135m-instruct", data={"max_length": 32})
    found = activations(one, 32)
    assert found.boundary == 32 * 576 * 2
    assert found.of(2, 30, checkpointing=True) == 2 * (30 * found.boundary + found.layer + found.rest)
    assert found.of(2, 30, checkpointing=True) < found.of(2, 30, checkpointing=False) / 5


@pytest.mark.parametrize("size", ["8B", "70B"])
def test_a_config_json_is_enough(tmp_path, size):
    one = config(written(tmp_path / size, size))
    found = model_size(one)
    assert found.parameters == PARAMETERS[size]
    assert found.cached == 2 * SIZES[size]["num_hidden_layers"] * 8 * 128
    plan = make_plan(one, cluster(nodes=1 if size == "8B" else 2))
    assert plan.best is not None
    assert plan.best.device_bytes <= 80 * 2**30 * ROOM
    # Of all stages the states are no less than 16 bytes a parameter over all ranks.
    states = plan.best.phases["training"]
    assert sum(states[name][0] for name in states if name.split()[0] in ("parameters", "gradients", "optimizer")) >= (
        16 * PARAMETERS[size] // plan.cluster.world
    )
    assert plan.as_configured is not None
    assert not plan.as_configured.fits(plan.cluster, None) or size == "8B"
    if size == "70B":
        assert plan.best.config.training.zero_stage == 3
        assert set(plan.best_by_stage) == {3}


def test_a_smaller_gpu_asks_for_more_saving_and_none_fits_nothing(tmp_path):
    one = config(written(tmp_path / "8B", "8B"))
    roomy, tight = (make_plan(one, cluster(gib=gib)) for gib in (180, 40))
    assert tight.best.device_bytes < roomy.best.device_bytes
    assert tight.best.time.longest > roomy.best.time.longest
    assert make_plan(one, cluster(gpus=1, gib=16)).best is None
    assert make_plan(one, cluster(gpus=8, gib=20), host_gib=8).best is None


def test_time_follows_links_devices_and_tokens(tmp_path):
    source = written(tmp_path / "8B", "8B")
    one = config(source, training={"zero_stage": 3})
    base = make_plan(one, cluster()).as_configured.time
    slow = make_plan(one, cluster(link="pcie")).as_configured.time
    assert slow.communication == pytest.approx(12 * base.communication)
    assert slow.products == base.products
    assert make_plan(one, cluster(device="a100")).as_configured.time.products > 3 * base.products
    assert make_plan(one, cluster(nodes=2)).as_configured.time.communication == pytest.approx(
        base.communication * 6 / 2 * (15 / 16) / (7 / 8)
    )  # a card between nodes is a sixth as fast, half as many micro-batches each
    # 6 operations a weight and token, and what attention adds.
    assert base.flops / (64 * 2048) == pytest.approx(6 * 7.5e9, rel=0.07)
    again = config(source, training={"zero_stage": 3}, model={"gradient_checkpointing": True})
    assert make_plan(again, cluster()).as_configured.time.products == pytest.approx(4 / 3 * base.products, rel=0.03)


def test_phases_say_where_memory_is(tmp_path):
    one = config(
        written(tmp_path / "8B", "8B"),
        training={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    )
    size, plan = model_size(one), batch_plan(one.training, 8)
    found = phases(one, size, plan, activations(one, 2048))
    assert set(found) == {"loading", "training", "answering while training", "evaluating", "export"}
    assert found["training"]["parameters"] == (PARAMETERS["8B"] * 2 // 8, HOST)
    assert found["training"]["optimizer states (fp32 master, two moments)"] == (PARAMETERS["8B"] * 12 // 8, HOST)
    assert found["evaluating"]["parameters"] == (PARAMETERS["8B"] * 2 // 8, DEVICE)
    whole = one.model_copy(update={"training": type(one.training)(zero_stage=1)})
    assert phases(whole, size, plan, activations(one, 2048))["evaluating"]["parameters"] == (
        PARAMETERS["8B"] * 2,
        DEVICE,
    )
    assert total(found["export"], HOST) > PARAMETERS["8B"] * 2
    packed = one.model_copy(update={"data": one.data.model_copy(update={"packing_tokens": 4096})})
    four = batch_plan(one.training.model_copy(update={"micro_batch_size": 4}), 8)
    assert (rows_of(one, four), rows_of(packed, four)) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"model": {"lora": {"dora": True}}}, {1, 2}),
        ({"model": {"compile": True}}, {1, 2}),
        ({"training": {"average_last": 0.2}}, {1, 2, 3}),
    ],
)
def test_no_way_is_planned_that_a_config_refuses(tmp_path, changes, stages):
    one = config(written(tmp_path / "8B", "8B"), **changes)
    found = list(ways(one, 8))
    assert {way.training.zero_stage for way in found} == stages
    for way in found:
        assert RunConfig.model_validate(way.model_dump()) == way


def test_averaged_weights_are_counted(tmp_path):
    one = config(written(tmp_path / "8B", "8B"), training={"average_last": 0.2})
    size, plan = model_size(one), batch_plan(one.training, 8)
    assert memory_estimate(one, size, plan)["averaged weights"] == (PARAMETERS["8B"] * 4 // 8, DEVICE)


def test_a_model_without_attention_is_counted(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99}
        )
    )
    found = model_size(config(tmp_path, model={"attention": "eager"}))
    assert (found.cached, found.layers, found.vocabulary) == (0, 2, 99)


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_in_four_bits_is_counted_with_its_scales(tmp_path, tied):
    source = write_tiny_model(tmp_path / "m", tied=tied, hidden=64)
    lora = {"r": 4, "load_in_4bit": True}
    one, dense = (config(source, model={"lora": {**lora, "load_in_4bit": packed}}) for packed in (True, False))
    size, plan = model_size(one), batch_plan(one.training, 2)
    attention, mlp, table = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 128, 400 * 64
    packed = 2 * (attention + mlp)
    rest = (1 if tied else 2) * table + 5 * 64
    assert (size.packed, size.parameters) == (packed, packed + rest)
    scales = packed / 64 + 4 * packed / (64 * 256)
    assert size.bytes_in_training(2) == pytest.approx(2 * rest + packed / 2 + scales, abs=1)
    assert size.bytes_in_training(2, 2) == pytest.approx(rest + packed / 4 + scales, abs=1)
    assert memory_estimate(one, size, plan)["parameters"] == (size.bytes_in_training(2), DEVICE)
    whole = memory_estimate(dense, model_size(dense), plan)
    assert {name: held for name, held in memory_estimate(one, size, plan).items() if name != "parameters"} == {
        name: held for name, held in whole.items() if name != "parameters"
    }
    saved = activations(dense, 64)
    found = phases(one, size, plan, saved)
    assert found["training"]["parameters"] == (size.bytes_in_training(2), DEVICE)
    assert found["evaluating"]["parameters"] == (2 * size.parameters, DEVICE)  # the exported model is dense


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_in_eight_bits_are_counted(tmp_path, stage):
    source = write_tiny_model(tmp_path / "m", tied=False, hidden=64)
    plain, packed = (
        config(source, training={"zero_stage": stage, "optimizer": optimizer}) for optimizer in ("adamw", "adamw_8bit")
    )
    size, plan = model_size(packed), batch_plan(packed.training, 2)
    large = 400 * 64 + 2 * (2 * 64 * 64 + 3 * 64 * 128)  # the head; not the embeddings, and neither keys nor values
    assert (size.large, size.trainable) == (large, large + 400 * 64 + 2 * 2 * 32 * 64 + 5 * 64)
    key = "optimizer states (fp32 master, two moments)"
    whole, part = (memory_estimate(one, size, plan) for one in (plain, packed))
    assert whole[key] == (size.trainable * 12 // 2, DEVICE)
    assert part[key][0] == pytest.approx((size.trainable * 12 - large * (6 - 2 * 4 / 256)) / 2, abs=1)
    assert {name: held for name, held in whole.items() if name != key} == {
        name: held for name, held in part.items() if name != key
    }
    times = [step_time(one, size, plan, cluster(gpus=2), 64).optimizer for one in (plain, packed)]
    passed = [size.trainable * 28, size.trainable * 28 - 2 * large * (6 - 2 * 4 / 256)]
    assert times[1] / times[0] == pytest.approx(passed[1] / passed[0])
    offloaded = config(source, training={"zero_stage": stage, "optimizer": "adamw_8bit", "offload_optimizer": True})
    assert memory_estimate(offloaded, size, plan)["moments, unpacked for their update"] == (12 * large // 2, HOST)


QWEN_8B = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "head_dim": 128,
           "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.slow  # PEFT wraps 252 layers
def test_the_config_in_four_bits_fits_the_gpu_that_it_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_8B))
    one = load_config("sft_8b_qlora", [f"model.source={tmp_path}"])
    planned = make_plan(one, cluster(gpus=1, gib=24, device="a10"))
    assert planned.as_configured is not None
    assert planned.as_configured.fits(planned.cluster, 64)
    needs = {name: total(held, DEVICE) / 2**30 for name, held in planned.as_configured.phases.items()}
    stated = {"loading": 5.7, "training": 9.5, "answering while training": 11.7, "evaluating": 19.8}  # docs/scale.md
    assert {name: round(needs[name], 1) for name in stated} == stated
    done = CliRunner().invoke(app, ["train", "sft_8b_qlora", "--dry-run", "--num-processes", "1",
                                    f"model.source={tmp_path}"])  # fmt: skip
    assert isinstance(done.exception, UserError)
    assert "8,190,735,360 parameters, 43,646,976 trained" in done.output


QWEN_32B = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "head_dim": 128,
            "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False}  # fmt: skip


def test_ranks_that_share_rows_hold_a_part_of_their_activations(tmp_path):
    source = written(tmp_path / "8B", "8B")
    alone, shared = (config(source, training={"sequence_parallel_size": size}) for size in (1, 4))
    size, saved = model_size(alone), Activations(2048, 10**9, 10**8, 10**7)
    held, part = (phases(one, size, batch_plan(one.training, 8), saved)["training"] for one in (alone, shared))
    for what in ("activations", "hidden states of the head and their gradient", "gradients within one layer"):
        assert part[what] == (held[what][0] // 4, DEVICE)
    assert part["optimizer states (fp32 master, two moments)"] == held["optimizer states (fp32 master, two moments)"]
    whole, quarter = (step_time(one, size, batch_plan(one.training, 8), cluster(), 2048) for one in (alone, shared))
    assert quarter.tokens == whole.tokens  # of a step, over all ranks
    assert quarter.products == pytest.approx(whole.products)
    assert quarter.communication > whole.communication
    assert {way.training.micro_batch_size for way in ways(shared, 8)} == {1, 2, 4, 8, 16, 32}
    assert not list(ways(shared, 6))


@pytest.mark.parametrize(
    ("name", "nodes", "stated"),
    [
        ("sft_70b_2nodes", 2, "70,553,706,496"),
        pytest.param("sft_32b_lora", 1, "32,762,", marks=pytest.mark.slow),  # PEFT wraps 450 layers
        ("sft_reasoning_8gpu", 1, "8,030,261,248"),
    ],
)
def test_the_large_configs_fit_where_they_say_and_a_dry_run_needs_weights_last(tmp_path, name, nodes, stated):
    source = written(tmp_path / "m", "8B" if "reasoning" in name else "70B")
    if "32b" in name:
        (source / "config.json").write_text(json.dumps(QWEN_32B))
    planned = make_plan(load_config(name, [f"model.source={source}"]), cluster(nodes=nodes), host_gib=1000)
    assert planned.as_configured is not None
    assert planned.as_configured.fits(planned.cluster, 1000)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {i}?", "answers": [f"{i}"]}) + "\n" for i in range(99)))
    here = [f"data.source={{kind: file, path: {rows}}}", "data.questions=null", f"output_dir={tmp_path / 'out'}"]
    none = [f"data.splits.{split}=0" for split in ("calibration", "temperature", "certification", "test")]
    less = ["penalties=[]", "training.evaluate_every=null"]
    command = [
        "train",
        name,
        "--dry-run",
        "--num-processes",
        str(8 * nodes),
        f"model.source={source}",
        *here,
        *none,
        *less,
    ]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert "holds no weights" in str(done.exception)
    assert f"{stated}" in done.output  # parameters, counted all the same
    assert '"stage": 3' in done.output
    assert done.output.count("micro-batches") >= 1


def test_the_command_prints_writes_and_refuses(tmp_path):
    source = written(tmp_path / "8B", "8B")
    run = ["plan", "sft", f"model.source={source}", "training.global_batch_size=64", "--json", str(tmp_path / "p.json")]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    assert "the fastest that fits" in done.output
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["parameters"] == PARAMETERS["8B"]
    assert told["best"]["fits"]
    load_config("sft", [f"{key}={json.dumps(value)}" for key, value in told["best"]["settings"].items()]
                + [f"model.source={source}", "training.global_batch_size=64"])  # fmt: skip
    assert CliRunner().invoke(app, [*run, "--gpus", "1x8"]).exit_code == 1
    for wrong in (["--gpus", "8"], ["--gpus", "0x80"], ["--link", "wire"], ["--device", "abacus"]):
        with pytest.raises(UserError, match=wrong[0]):
            CliRunner().invoke(app, [*run, *wrong], catch_exceptions=False)

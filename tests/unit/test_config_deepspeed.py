"""The derived DeepSpeed JSON, users' own ones, and what the engine does with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from calibtrain.config import RunConfig, TrainingConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.training.deepspeed_config import batch_plan, deepspeed_dict


def config(dtype="bf16", **training):
    return RunConfig.model_validate({"model": {"dtype": dtype}, "training": training})


@pytest.mark.parametrize(("micro", "total", "world"), [(1, 8, 1), (4, 8, 2), (1, 8, 2), (3, 36, 4)])
def test_batch_plan_meets_the_global_batch(micro, total, world):
    plan = batch_plan(TrainingConfig(micro_batch_size=micro, global_batch_size=total), world)
    assert plan.global_batch_size == total == micro * plan.accumulation_steps * world


def test_batch_plan_suggests_numbers_that_work():
    with pytest.raises(UserError) as caught:
        batch_plan(TrainingConfig(micro_batch_size=4, global_batch_size=12), 2)
    message = str(caught.value)
    assert "global_batch_size=8 or 16" in message
    assert "micro_batch_size=3" in message
    assert "1 process(es)" in message
    for training, world in (({"global_batch_size": 16}, 2), ({"micro_batch_size": 3}, 2), ({}, 1)):
        batch_plan(TrainingConfig(**{"micro_batch_size": 4, "global_batch_size": 12, **training}), world)


def test_ranks_that_share_rows_count_as_one():
    training = {"micro_batch_size": 2, "global_batch_size": 12, "sequence_parallel_size": 4}
    plan = batch_plan(TrainingConfig(**training), 8)
    assert (plan.groups, plan.accumulation_steps, plan.global_batch_size) == (2, 3, 12)
    resolved = deepspeed_dict(config(**training), 8)
    assert resolved["sequence_parallel_size"] == 4
    assert "sequence_parallel_size" not in deepspeed_dict(config(), 2)
    with pytest.raises(UserError, match=r"no whole groups of 4: start a multiple of 4, or set 3"):
        batch_plan(TrainingConfig(**training), 6)
    with pytest.raises(UserError, match=r"on 2 group\(s\) of 4 process") as caught:
        batch_plan(TrainingConfig(**{**training, "global_batch_size": 10}), 8)
    assert "4 process(es)" in str(caught.value)
    batch_plan(TrainingConfig(**{**training, "global_batch_size": 10}), 4)


def test_a_mesh_of_the_users_own_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"data_parallel_size": 4, "sequence_parallel_size": 2}))
    with pytest.raises(UserError, match="data_parallel_size: it follows from the number of processes"):
        deepspeed_dict(config(sequence_parallel_size=2, micro_batch_size=1, deepspeed=path), 8)


def test_a_json_of_the_users_own_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"steps_per_print": 7}), encoding="utf-8-sig")
    assert deepspeed_dict(config(deepspeed=path), 1)["steps_per_print"] == 7


def test_suggestions_take_no_time_whatever_the_numbers():
    with pytest.raises(UserError, match=r"or 1 process"):
        batch_plan(TrainingConfig(micro_batch_size=1, global_batch_size=2**31 - 1), 7)


STAGES = [(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16") if (stage, dtype) != (0, "bf16")]


def test_bf16_without_sharded_master_weights_is_refused():
    """DeepSpeed's FP16_UnfusedOptimizer leaves the other stages' trajectory after the first step."""
    with pytest.raises(ValueError, match="zero_stage: 1"):
        config("bf16", zero_stage=0)


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_derived(stage, dtype):
    resolved = deepspeed_dict(config(dtype, zero_stage=stage, micro_batch_size=2), 2)
    assert resolved["zero_optimization"]["stage"] == stage
    assert resolved["bf16"]["enabled"] == (dtype == "bf16")
    assert resolved["gradient_accumulation_steps"] == 2
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved
    assert ("data_types" in resolved) == (dtype == "bf16" and stage >= 2)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_jsons_are_filled(name):
    offload = "offload" in name
    loaded = load_config(
        "demo",
        ["training.micro_batch_size=4", "model.dtype=bf16",
         f"training.deepspeed=configs/deepspeed/{name}.json", f"training.zero_stage={name[4]}",
         f"training.offload_optimizer={offload}", f"training.offload_parameters={offload}"],
    )  # fmt: skip
    path = Path(__file__).parents[2] / "configs" / "deepspeed" / f"{name}.json"
    loaded = loaded.model_copy(update={"training": loaded.training.model_copy(update={"deepspeed": path})})
    for hidden in (None, 576):
        resolved = deepspeed_dict(loaded, 2, hidden_size=hidden)
        assert "auto" not in json.dumps(resolved)
        assert resolved["train_batch_size"] == 8
        assert resolved["bf16"] == {"enabled": True}
        assert ("offload_param" in resolved["zero_optimization"]) == offload
    if name == "zero3":
        assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == 5760


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, "'AdamW', but training.optimizer is adamw_8bit, of adamw, adamw_8bit"),
        ({"zero_allow_untested_optimizer": False}, "but training.optimizer is adamw_8bit; leave it out"),
        ({"optimizer": {"type": "AdamW8bit"}}, None),
    ],
)
def test_an_optimizer_of_eight_bits_may_be_repeated_alone(tmp_path, theirs, words):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    own = config(deepspeed=file, optimizer="adamw_8bit")
    if words is None:
        assert deepspeed_dict(own, 2)["zero_allow_untested_optimizer"] is True
        return
    with pytest.raises(UserError) as caught:
        deepspeed_dict(own, 2)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"train_batch_size": 7}, "training.global_batch_size makes it 8"),
        ({"zero_optimization": {"stage": 3}}, "training.zero_stage makes it 2"),
        ({"bf16": {"enabled": False}}, "model.dtype makes it True"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"gradient_clipping": 0.5}, "training.max_grad_norm makes it 1.0"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "training.offload_optimizer is false"),
        ({"optimizer": {"type": "Lion"}}, "'Lion', but training.optimizer is adamw, of adamw, adamw_8bit; delete"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "training.learning_rate is 2e-05"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "training.schedule"),
        ({"managed_gradient_accumulation": False}, "counting micro-batches"),
        ({"gradient_allreduce_op": "sum"}, "mean over ranks"),
        ({"tensor_parallel": {"autotp_size": 2}}, "ZeRO-3"),
    ],
)
def test_contradictions_are_named(tmp_path, theirs, words):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    with pytest.raises(UserError) as caught:
        deepspeed_dict(config(deepspeed=file), 2)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_json_of_the_users_own_is_kept_as_it_is(tmp_path):
    file = tmp_path / "ds.json"
    theirs = {"zero_optimization": {"stage": "auto", "reduce_bucket_size": 7}, "wall_clock_breakdown": True,
              "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"params": {"x": "auto"}}}  # fmt: skip
    file.write_text(json.dumps(theirs))
    resolved = deepspeed_dict(config(deepspeed=file), 2)
    assert resolved["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert resolved["wall_clock_breakdown"] is True
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved


@pytest.mark.parametrize(
    ("text", "words"), [('{"a": 1, "a": 2}', "twice"), ("{\n,", ":2: not valid JSON"), ("[]", "JSON object"),
                        ('{"bf16": 1}', "bf16 is a JSON object")]
)  # fmt: skip
def test_broken_jsons(tmp_path, text, words):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=words):
        deepspeed_dict(config(deepspeed=tmp_path / "ds.json"), 2)


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"training.deepspeed: .*none.json"):
        deepspeed_dict(config(deepspeed=tmp_path / "none.json"), 2)


@pytest.mark.distributed
def test_the_engine_takes_every_stage_and_its_arithmetic_is_the_documented_one(tmp_path):
    """Loss / global count * world, scale_wrt_gas=False: gradient norms of one plain process, for each stage."""
    script = Path(__file__).parent / "engine_cases.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(tmp_path / "rows.json")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["stage"], row["dtype"]) for row in rows["cases"]} == set(STAGES)
    for row in rows["cases"]:
        tolerance = 1e-5 if row["dtype"] == "fp32" else 2e-2
        for found, expected in zip(row["norms"], rows["reference"], strict=True):
            if found is not None:  # stage 0 in fp32 has no norm of its own
                assert found == pytest.approx(expected, rel=tolerance), row

"""The command: what it imports, what it prints, how it ends."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.dry_run import rank_table
from calibtrain.pipeline.plan_memory import ModelSize, memory_estimate, model_size
from calibtrain.training.deepspeed_config import BatchPlan
from tests.tiny import write_tiny_model
from tests.unit.models.test_reward_scorer import write as write_reward_model


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "calibtrain.cli", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom calibtrain import cli\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    result = CliRunner().invoke(cli.app, words)\n    assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'wandb', 'datasets', 'plotly', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_command_is_listed():
    output = CliRunner().invoke(cli.app, ["--help"]).output
    for name in (
        "train",
        "evaluate",
        "calibrate",
        "certify",
        "confidence",
        "monitor",
        "probe",
        "report",
        "answer",
        "serve",
        "trust",
        "doctor",
        "demo",
        "losses",
        "version",
    ):
        assert name in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "demo", "training.learning_rat=1"], "did you mean `learning_rate`"),
        (["train", "nothing.yaml"], "Shipped configs"),
        (["train", "demo", "--num-processes", "3"], "cannot be cut into micro-batches"),
        (["evaluate", "demo", "--split", "train"], "none of calibration"),
        (["evaluate", "demo", "--model", "/nowhere"], "no config.json"),
        (["evaluate", "demo", "--output", "/"], "--output: / is a directory; name a file in it"),
        (["evaluate", "demo", "--output", "/dev/null/answers.jsonl"], "/dev/null/answers.jsonl cannot be written"),
        (["report", "/nowhere"], "no such directory"),
        (["report", "--lm-eval", "/nowhere.jsonl"], "no such file"),
        (["report"], "either the output_dir"),
        (["answer", "/nowhere", "?"], "no such directory"),
        (["calibrate", ".", "--target-risk", "2"], "not between 0 and 1"),
        (["certify", ".", "--risk", "0"], "--risk: 0.0 is not between 0 and 1"),
        (["report", 300 * "x"], "name too long"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_losses_lists_every_method_with_its_keys_and_papers():
    done = command("losses", COLUMNS="300")
    assert done.returncode == 0, done.stderr
    for words in ("soft_binned_ece", "polar_drift", "kl_k3", "2402.14740", "nll_scope", "refresh_every"):
        assert words in done.stdout


def test_rank_table_names_a_device_for_each_rank():
    plan = BatchPlan(micro_batch_size=2, accumulation_steps=3, world_size=2)
    assert [row.device for row in rank_table(plan, host="h", devices=["cuda:4", "cuda:6"])] == ["cuda:4", "cuda:6"]
    assert [(row.rank, row.device, row.micro_batches) for row in rank_table(plan, host="h", devices=[])] == [
        (0, "cpu", 3),
        (1, "cpu", 3),
    ]


@pytest.mark.parametrize(("stage", "expected"), [(1, (200, 200, 600)), (2, (200, 200, 600)), (3, (100, 200, 600))])
def test_memory_of_bf16_by_stage(stage, expected):
    from calibtrain.config import RunConfig

    config = RunConfig.model_validate(
        {
            "model": {"dtype": "bf16"},
            "training": {"zero_stage": stage, "micro_batch_size": 1},
            "data": {"max_length": 10},
        }
    )
    size = ModelSize(parameters=100, trainable=100, vocabulary=1000, hidden_size=8)
    estimate = memory_estimate(config, size, BatchPlan(1, 1, 2))
    assert tuple(count for count, _ in estimate.values())[:3] == expected
    assert estimate["logits and their gradient, not held"][0] == 2 * 2 * 10 * 1000 * 4


def test_memory_counts_every_model_that_a_run_holds(tmp_path):
    from calibtrain.config import RunConfig

    source = str(write_tiny_model(tmp_path / "m"))
    rollouts, plain = {"reward_model": str(write_reward_model(tmp_path))}, {"source": source, "dtype": "bf16"}
    for objective, model, held in (
        ({"name": "grpo"}, plain, (1, 0)),
        ({"name": "ppo", "value_model": "own", "beta": 0.1}, plain, (2, 1)),
        ({"name": "grpo", "beta": 0.1}, {**plain, "lora": {}}, (1, 0)),  # its adapters are switched off
    ):
        size = model_size(RunConfig.model_validate({"objective": objective, "rollouts": rollouts, "model": model}))
        one = size.parameters // held[0]
        assert (size.parameters, size.starting) == (held[0] * one, held[1] * one)
        assert size.rewards > 0
        estimate = memory_estimate(RunConfig.model_validate({"model": {"dtype": "bf16"}}), size, BatchPlan(1, 1, 2))
        assert estimate.get("starting model", (0, ""))[0] == 2 * size.starting


def test_dry_run_of_a_local_model_prints_everything_and_runs_nothing(tmp_path):
    write_tiny_model(tmp_path / "m", hidden=16, layers=1, num_attention_heads=2)
    done = command(
        "train", "demo", "--dry-run", "--num-processes", "2", "training.micro_batch_size=4",
        f"model.source={tmp_path / 'm'}", f"output_dir={tmp_path / 'out'}", "model.lora={r: 2}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in (
        "answer_score",
        '"train_batch_size": 8',
        "local rank",
        "optimizer states",
        "parameters",
        "steps of 8 records",
    ):
        assert words in done.stdout
    linear = 2 * (2 * (16 + 16) + 2 * (16 + 16) + 3 * (16 + 32))
    assert f"{linear} trained" in done.stdout
    assert not (tmp_path / "out").exists()

"""Reinforcement learning, KTO and reward models on two ranks, at every ZeRO stage: runs resume bit for bit, also inside a
round, and what is exported loads."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.jobs import metrics, trained, write_job
from tests.distributed.ranks import run
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BETA = 0.05
GRADED = {"truncated": "graded"}  # an answer of one token is always cut
JOBS = {  # objective, rollouts, training, model
    "rloo0": ({"name": "rloo", "beta": BETA},
              {"group_size": 4, "steps_per_round": 2, "correction": "sequence_truncate"}, {"zero_stage": 0}, {}),
    "grpo1": ({"name": "grpo"}, {"group_size": 4, "reward": "log", "epochs": 2}, {"zero_stage": 1},
              {"lora": {"r": 2, "dropout": 0.2}}),
    "ppo2": ({"name": "ppo", "beta": BETA, "value_model": "own"},
             {"group_size": 2, "steps_per_round": 2, "epochs": 2, **GRADED}, {"zero_stage": 2}, {}),
    "grpo3": ({"name": "grpo", "norm": "token", "beta": BETA}, {"group_size": 4, "steps_per_round": 2}, {"zero_stage": 3},
              {"lora": {"r": 2}}),
    "grpo3whole": ({"name": "grpo", "beta": BETA}, {"group_size": 2, "steps_per_round": 2, "dynamic_sampling": 3},
                   {"zero_stage": 3}, {"source": "untied"}),
    "ppo3": ({"name": "ppo", "value_model": "own", "value_learning_rate": 3e-3},
             {"group_size": 2, "reward": "brier", "accuracy_weight": 0.5, "epochs": 2, **GRADED}, {"zero_stage": 3},
             {"source": "untied"}),
    "kto3": ({"name": "kto"}, {}, {"zero_stage": 3}, {}),
    "reward3": ({"name": "reward_model"}, {}, {"zero_stage": 3}, {}),
}  # fmt: skip
LENGTH = {name: one[1].get("steps_per_round", 1) * one[1].get("epochs", 1) for name, one in JOBS.items()}
"""Optimiser steps that learn from one round."""


def job(folder, name):
    """A run whose checkpoint at step 3 is inside a round, or between two passes; half of all one-token answers are right."""
    objective, rollouts, training, model = JOBS[name]
    path = write_job(folder, name, penalties=[], training={"checkpoint_every": 3, "keep_checkpoints": 9, **training})
    config = yaml.safe_load(path.read_text())
    config["model"].update(model | ({"source": str(folder / model["source"])} if "source" in model else {}))
    config["evaluation"]["max_new_tokens"] = 1
    config.update(objective=objective, rollouts={"reward": "accuracy", **rollouts})
    if name == "grpo3":
        config["penalties"] = [{"name": "answer_score", "moves": "all"}]
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    paths = [job(folder, name) for name in JOBS]
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode([token]).strip() for token in range(4, len(tokenizer), 2)]
    rows = [{"question": f"What is {i}?", "answers": [text for text in texts if text]} for i in range(200)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run(trained(2, *paths), folder, 500)
    assert ended.code == 0, ended.output[-6000:]
    whole = {}
    for name in JOBS:
        output = folder / name
        whole[name] = (metrics(output), weights(output))
        shutil.rmtree(output / "model")
        shutil.rmtree(output / "checkpoints" / "step-0000006")
    ended = run([*trained(2, *paths), "training.resume=auto"], folder, 500)
    assert ended.code == 0, ended.output[-6000:]
    return folder, whole


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def logs(lines):
    return {line["step"]: line for line in lines if line["event"] == "log"}


@pytest.mark.parametrize("name", JOBS)
def test_resumed_run_is_the_whole_one_bit_for_bit(runs, name):
    folder, whole = runs
    lines, expected = whole[name]
    found = weights(folder / name)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    again = logs(metrics(folder / name))
    assert {step: again[step] for step in (4, 5, 6)} == {step: logs(lines)[step] for step in (4, 5, 6)}


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("kto3", "reward3")])
def test_rollouts_are_logged_and_learned_from(runs, name):
    _, whole = runs
    lines = logs(whole[name][0])
    assert all(0 < lines[step]["train/rollouts/correct"] < 1 for step in lines)
    assert any(line["train/grad_norm"] > 1e-4 for line in lines.values())
    scored = name in ("grpo1", "grpo3", "ppo3")
    assert all((line.get("train/loss/answer_score", 0) > 0) == scored for line in lines.values())
    rewards = [lines[step]["train/rollouts/confidence"] for step in sorted(lines)]
    rounds = [(step - 1) // LENGTH[name] for step in sorted(lines)]
    same = [one == before for before, one in pairwise(rounds)]
    assert [one == before for before, one in pairwise(rewards)] == same
    assert all(line["train/policy/ratio"] == pytest.approx(1.0, abs=0.2) for line in lines.values())
    moved = [abs(lines[step]["train/policy/ratio"] - 1.0) > 1e-6 for step in sorted(lines) if (step - 1) % LENGTH[name]]
    assert all(moved)
    if JOBS[name][0].get("value_model"):
        assert all(line["train/rollouts/explained_variance"] < 1 for line in lines.values())
        assert not any("value" in key or "score" in key for key in weights(runs[0] / name))
    if JOBS[name][1].get("dynamic_sampling"):
        assert all(line["train/rollouts/asked"] == 8 + line["train/rollouts/thrown_away"] for line in lines.values())
        assert max(line["train/rollouts/thrown_away"] for line in lines.values()) > 0


def test_reference_point_is_zero_at_the_start_and_is_logged(runs):
    points = [line["train/rollouts/reference_point"] for line in logs(runs[1]["kto3"][0]).values()]
    assert points[0] == pytest.approx(0.0, abs=1e-5)
    assert all(point >= 0 for point in points)


def test_exported_reward_model_loads(runs):
    from transformers import AutoModelForSequenceClassification

    folder, whole = runs
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward3" / "model")
    assert model.config.num_labels == 1
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)
    lines = logs(whole["reward3"][0])
    assert lines[6]["train/loss/preference"] < lines[1]["train/loss/preference"]

"""Reinforcement learning, KTO and reward models on two ranks, at every ZeRO stage: runs resume bit for bit, also inside a
round, and what is exported loads."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import calibtrain
from calibtrain import cli
from calibtrain.confidence.head import HeadInputs
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import source
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.pipeline.prepare import prepare
from tests.distributed.jobs import metrics, trained, write_job
from tests.distributed.ranks import run
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BETA = 0.05
JOBS = {  # objective, rollouts, training, model
    "rloo0": ({"name": "rloo", "beta": BETA}, {"group_size": 4, "steps_per_round": 2}, {"zero_stage": 0}, {}),
    "grpo1": ({"name": "grpo"}, {"group_size": 4, "reward": "log", "confidence": "head"}, {"zero_stage": 1},
              {"lora": {"r": 2, "dropout": 0.2}}),
    "ppo2": ({"name": "ppo", "beta": BETA}, {"group_size": 2, "steps_per_round": 2}, {"zero_stage": 2}, {}),
    "grpo3": ({"name": "grpo", "norm": "token", "beta": BETA}, {"group_size": 4, "steps_per_round": 2}, {"zero_stage": 3},
              {"lora": {"r": 2}}),
    "grpo3whole": ({"name": "grpo", "beta": BETA}, {"group_size": 2}, {"zero_stage": 3}, {"source": "untied"}),
    "ppo3": ({"name": "ppo"}, {"group_size": 4, "reward": "brier", "accuracy_weight": 0.5}, {"zero_stage": 3}, {}),
    "kto3": ({"name": "kto"}, {}, {"zero_stage": 3}, {}),
    "reward3": ({"name": "reward_model"}, {}, {"zero_stage": 3}, {}),
}  # fmt: skip
HEADS = {  # of the jobs that train one, and whether it is solved for at the end: so few questions are too few
    "grpo1": ({}, True),
    "ppo3": ({"trains_backbone": True, "layers": [0, 2]}, True),
    "kto3": ({"refresh_every": 2, "fit_questions": 8}, False),
}


def job(folder, name):
    """A run whose checkpoint at step 3 lies inside a round of two steps; half of all one-token answers are right."""
    objective, rollouts, training, model = JOBS[name]
    path = write_job(folder, name, penalties=[], training={"checkpoint_every": 3, "keep_checkpoints": 9, **training})
    config = yaml.safe_load(path.read_text())
    config["model"].update(model | ({"source": str(folder / model["source"])} if "source" in model else {}))
    config["evaluation"]["max_new_tokens"] = 1
    config.update(objective=objective, rollouts={"reward": "accuracy", **rollouts})
    if name in HEADS:
        config["confidence_head"], solved = HEADS[name]
        splits = {"calibration": 60, "temperature": 30, "certification": 30} if solved else {}
        config["data"]["splits"].update(splits)
        config["task"] = {"kind": "short_answer", "match": "exact_match"}  # greedy, a tiny model may always say ":"
    if name == "grpo3":
        config["penalties"] = [{"name": "answer_score", "moves": "all"}]
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    paths = [job(folder, name) for name in JOBS]
    tokenizer = tiny_tokenizer()
    texts = [[tokenizer.decode([token]).strip() for token in range(k, len(tokenizer), 2)] for k in (4, 5)]
    # Half of the tokens are right, and of questions as well, whatever a policy always says.
    rows = [{"question": f"What is {i}?", "answers": [text for text in texts[i % 2] if text]} for i in range(800)]
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
    head = output / "confidence_head" / "head.safetensors"
    return load_file(output / "model" / "model.safetensors") | (load_file(head) if head.is_file() else {})


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
    assert all((line.get("train/loss/confidence_head", 0) > 0) == (name in HEADS) for line in lines.values())
    scored = name in ("grpo3", "ppo3")
    assert all((line.get("train/loss/answer_score", 0) > 0) == scored for line in lines.values())
    if JOBS[name][1].get("steps_per_round") == 2:
        first, second, third = (lines[step]["train/rollouts/reward"] for step in (1, 2, 3))
        assert first == second
        assert second != third


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_kept_beside_its_model(runs, name):
    """It is the likelihood no more, belongs to the exported weights, and was trained, or solved for, as its run allows."""
    folder, _ = runs
    output, solved = folder / name, HEADS[name][1]
    facts = json.loads((output / "confidence_head" / "head.json").read_text())
    assert facts["fingerprint"]["weights_hash"] == weights_hash(output / "model")
    assert facts["layers"] == HEADS[name][0].get("layers", [1, 2])
    assert (facts["how"], facts["n"] > 0) == (("solved", True) if solved else ("trained", False))
    kept = load_file(output / "confidence_head" / "head.safetensors")
    assert kept["states"].shape == (2, 3, 32)
    if not solved:
        assert 0 < (kept["slope"] - 1).abs() < 0.1
        assert kept["states"].abs().max() > 0


def test_a_head_is_certified_and_answers(runs):
    folder, _ = runs
    output = folder / "ppo3"
    found = source.run(output, "head", target_risk=0.9)
    assert found.calibrator.method == "platt"
    config = load_config(output / "config.yaml")
    asked = prepare(config).splits["certification"]
    answerer = calibtrain.load(output, source="head", uncertified=True)
    answered = answerer.loaded.answer(asked, layers=answerer.scorer.layers)
    expected = answerer.calibrated.calibrator.apply(answerer.scorer.head.score(answered).values)
    replies = answerer.answers([one.question for one in asked])
    assert [one.probability for one in replies] == pytest.approx(expected.tolist(), abs=1e-4)
    assert {(one.forward_passes, one.tokens_read) for one in replies} == {(0, 0)}
    foreign = answerer.scorer.head.foreign(HeadInputs.of(answered))
    assert [one.source for one in replies] == ["likelihood" if one else "head" for one in foreign]
    assert foreign.mean() < 0.3
    (other,) = answerer.answers(["quux blarg " * 3])
    assert other.source == "likelihood"
    printed = CliRunner().invoke(cli.app, ["evaluate", str(output / "config.yaml"), "--model", str(output / "model")])
    assert printed.exit_code == 0, printed.output
    assert "by its confidence head" in printed.output
    moved = load_file(output / "model" / "model.safetensors")
    save_file({key: value + 1e-3 for key, value in moved.items()}, output / "model" / "model.safetensors")
    try:
        with pytest.raises(UserError, match="not after quantisation or further training"):
            source.run(output, "head")
    finally:
        save_file(moved, output / "model" / "model.safetensors", metadata={"format": "pt"})


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

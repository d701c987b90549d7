"""Reinforcement learning, KTO and reward models on two ranks, at every ZeRO stage: runs resume bit for bit, also inside a
round, and what is exported loads."""

import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import calibtrain
from calibtrain import cli
from calibtrain.confidence.head import HeadInputs
from calibtrain.confidence.stated import read_statement
from calibtrain.config_file import load_config
from calibtrain.data.templates import template_of
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.loading import load_tokenizer
from calibtrain.models.reward_scorer import RewardScorer
from calibtrain.pipeline import source
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.spectra import at_step
from calibtrain.training.reward_sources import model_text
from tests.distributed.jobs import metrics, trained, write_job
from tests.distributed.ranks import run
from tests.policy_server import PolicyServer
from tests.tiny import tiny_tokenizer
from tests.unit.models.test_reward_scorer import write as write_reward_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BETA = 0.05
GRADED = {"truncated": "graded"}  # an answer of one token is always cut
JOBS = {  # objective, rollouts, training, model
    "rloo0": ({"name": "rloo", "beta": BETA},
              {"group_size": 4, "steps_per_round": 2, "correction": "sequence_truncate"}, {"zero_stage": 0}, {}),
    "grpo1": ({"name": "grpo"}, {"group_size": 4, "reward": "log", "confidence": "head", "epochs": 2}, {"zero_stage": 1},
              {"lora": {"r": 2, "dropout": 0.2}}),
    "ppo2": ({"name": "ppo", "beta": BETA, "value_model": "own"},
             {"group_size": 2, "steps_per_round": 2, "epochs": 2, **GRADED}, {"zero_stage": 2}, {}),
    "grpo3": ({"name": "grpo", "norm": "token", "beta": BETA}, {"group_size": 4, "steps_per_round": 2}, {"zero_stage": 3},
              {"lora": {"r": 2}}),
    "grpo3whole": ({"name": "grpo", "beta": BETA}, {"group_size": 2, "steps_per_round": 2, "dynamic_sampling": 3},
                   {"zero_stage": 3}, {"source": "untied"}),
    "ppo3": ({"name": "ppo", "value_model": "own", "value_learning_rate": 3e-3},
             {"group_size": 4, "reward": "brier", "accuracy_weight": 0.5, "epochs": 2, **GRADED}, {"zero_stage": 3},
             {"source": "untied"}),
    "judged3": ({"name": "grpo"}, {"group_size": 4, "steps_per_round": 2, "reward": "ppo_c", "confidence": "stated",
                "sources": [{"kind": "model", "path": "judge"}, {"kind": "grade", "normalize": True, "clip": 2.0}],
                "decoupled": False}, {"zero_stage": 3}, {}),
    "served3": ({"name": "grpo"}, {"group_size": 2, "steps_per_round": 2, "engine": {"kind": "vllm", "overlap": True}},
                {"zero_stage": 3}, {}),
    "kto3": ({"name": "kto"}, {}, {"zero_stage": 3}, {}),
    "reward3": ({"name": "reward_model"}, {}, {"zero_stage": 3}, {}),
}  # fmt: skip
LENGTH = {name: one[1].get("steps_per_round", 1) * one[1].get("epochs", 1) for name, one in JOBS.items()}
"""Optimiser steps that learn from one round."""
HEADS = {  # of the jobs that train one, and whether it is solved for at the end: so few questions are too few
    "grpo1": ({}, True),
    "ppo3": ({"trains_backbone": True, "layers": [0, 2]}, True),
    "kto3": ({"refresh_every": 2, "fit_questions": 8}, False),
}


def job(folder, name):
    """A run whose checkpoint at step 3 is inside a round, or between two passes; half of all one-token answers are right."""
    objective, rollouts, training, model = JOBS[name]
    path = write_job(folder, name, penalties=[], training={"checkpoint_every": 3, "keep_checkpoints": 9, **training})
    config = yaml.safe_load(path.read_text())
    config["model"].update(model | ({"source": str(folder / model["source"])} if "source" in model else {}))
    config["evaluation"]["max_new_tokens"] = 1
    for paid in rollouts.get("sources", ()):  # a reward model of its own, sharded as the policy is
        paid |= {"path": str(write_reward_model(folder / "judge"))} if "path" in paid else {}
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
    with PolicyServer(folder / "tiny") as server:
        yield folder, ended(folder, paths, server)


def ended(folder, paths, server):
    """Metrics and weights of whole runs, whose last half was then made again from a checkpoint."""
    served = yaml.safe_load((folder / "served3.yaml").read_text())
    served["rollouts"]["engine"]["address"] = server.url
    (folder / "served3.yaml").write_text(yaml.safe_dump(served))
    tokenizer = tiny_tokenizer()
    texts = [[tokenizer.decode([token]).strip() for token in range(k, len(tokenizer), 2)] for k in (4, 5)]
    # Half of the tokens are right, and of questions as well, whatever a policy always says.
    rows = [{"question": f"What is {i}?", "answers": [text for text in texts[i % 2] if text]} for i in range(800)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(trained(2, *paths), folder, 500)
    assert done.code == 0, done.output[-6000:]
    whole = {}
    for name in JOBS:
        output = folder / name
        whole[name] = (metrics(output), weights(output))
        shutil.rmtree(output / "model")
        shutil.rmtree(output / "checkpoints" / "step-0000006")
    done = run([*trained(2, *paths), "training.resume=auto"], folder, 500)
    assert done.code == 0, done.output[-6000:]
    return whole


def weights(output):
    head = output / "confidence_head" / "head.safetensors"
    return load_file(output / "model" / "model.safetensors") | (load_file(head) if head.is_file() else {})


def logs(lines):
    return {line["step"]: line for line in lines if line["event"] == "log"}


def test_checkpoints_of_adapters_do_not_hold_the_frozen_model(runs):
    folder, _ = runs
    for name in ("grpo1", "grpo3"):
        files = list((folder / name / "checkpoints" / "step-0000003" / "engine").iterdir())
        keys = {key for file in files for key in load_file(file)}
        assert len(files) == 2
        assert any("lora_" in key for key in keys)
        assert not any("base_layer" in key or "embed" in key for key in keys)
    with at_step(folder / "grpo1", 3) as compared:  # whole again
        tuned, start = (load_file(one / "model.safetensors") for one in (compared.tuned, compared.base))
        moved = {name for name in start if not torch.equal(tuned[name], start[name].float())}
        assert moved
        assert all("proj" in name for name in moved)


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
    told = [
        lines[step].get("train/rollouts/confidence", lines[step]["train/rollouts/reward"]) for step in sorted(lines)
    ]
    rounds = [(step - 1) // LENGTH[name] for step in sorted(lines)]
    same = [one == before for before, one in pairwise(rounds)]
    assert [one == before for before, one in pairwise(told)] == same
    assert all(line["train/policy/ratio"] == pytest.approx(1.0, abs=0.2) for line in lines.values())
    moved = [abs(lines[step]["train/policy/ratio"] - 1.0) > 1e-6 for step in sorted(lines) if (step - 1) % LENGTH[name]]
    assert all(moved)
    if JOBS[name][0].get("value_model"):
        assert all(line["train/rollouts/explained_variance"] < 1 for line in lines.values())
        assert not any("value" in key or "score" in key for key in weights(runs[0] / name))
    if JOBS[name][1].get("dynamic_sampling"):
        assert all(line["train/rollouts/asked"] == 8 + line["train/rollouts/thrown_away"] for line in lines.values())
        assert max(line["train/rollouts/thrown_away"] for line in lines.values()) > 0


def test_a_sharded_reward_model_scores_as_a_whole_one(runs):
    """On two ranks, by the round in a checkpoint; and its running statistics go on from there."""
    folder, whole = runs
    lines = logs(whole["judged3"][0])
    config = load_config(folder / "judged3.yaml")
    train = prepare(config).splits["train"]
    state = json.loads((folder / "judged3" / "checkpoints" / "step-0000003" / "rank0.json").read_text())["rollouts"]
    template = template_of(config, load_tokenizer(config.model))
    source = config.rollouts.paid_by[0]
    text, alone = model_text(source, "key"), World(0, 1, 0, torch.device("cpu"))
    said = [read_statement(template.decode_answer(one["tokens"])).answer for one in state["samples"]]
    ids = [text(train[one["question"]], words, 99)[0] for one, words in zip(state["samples"], said, strict=True)]
    wanted = RewardScorer(source, "key", torch.float32, alone)(ids)
    assert [one["rewards"][0] for one in state["samples"]] == pytest.approx(wanted, abs=1e-4)
    assert state["rewards"]["moments"][0]["count"] == len(wanted)  # of the round before
    assert all(f"train/rollouts/source_{name}" in lines[1] for name in ("model", "grade"))
    assert lines[3]["train/rollouts/ppo_c_threshold"] != lines[5]["train/rollouts/ppo_c_threshold"]
    (measured,) = json.loads((folder / "judged3" / "reward_model.json").read_text())["models"]
    assert measured["pairs"] > 0
    assert measured["path"] == str(folder / "judge")


def test_a_server_answers_by_the_weights_of_the_round_before(runs):
    lines = logs(runs[1]["served3"][0])
    assert [lines[step]["train/rollouts/staleness"] for step in range(1, 7)] == [0, 0, 2, 2, 2, 2]
    assert all(line["train/rollouts/engine_gap"] < 1e-4 for line in lines.values())
    assert all(lines[step]["train/rollouts/policy_moved"] > 1e-3 for step in (3, 5))


def test_a_run_whose_server_is_lost_keeps_what_it_learnt(runs, tmp_path):
    """Both ranks end, with one line, behind a checkpoint of the last step."""
    folder, _ = runs
    with PolicyServer(folder / "tiny") as server:
        config = yaml.safe_load((folder / "served3.yaml").read_text())
        config["rollouts"]["engine"] |= {"address": server.url, "wait": 0.5, "overlap": False}
        config["training"] |= {"zero_stage": 1, "deepspeed": None, "checkpoint_every": None, "max_steps": 60}
        config["output_dir"] = str(tmp_path / "lost")
        (tmp_path / "lost.yaml").write_text(yaml.safe_dump(config))

        def stop(pid):
            log = tmp_path / "lost" / "metrics.jsonl"
            if log.exists() and len(log.read_text().splitlines()) > 3:
                server.before = lambda path: (503, {})
            return False

        done = run(trained(2, tmp_path / "lost.yaml"), tmp_path, 200, watch=stop)
    assert done.code != 0
    (kept,) = (tmp_path / "lost" / "checkpoints").glob("step-*")
    steps = max(logs(metrics(tmp_path / "lost")))
    assert kept.name == f"step-{steps:07d}"
    words = re.search(r"EngineFailure: (.*waited 0.5 s .*)", done.output)[1]
    assert f"training stopped after step {steps} of 60; checkpoint: {kept}" in words
    assert "The same command with training.resume=auto goes on from there" in words


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

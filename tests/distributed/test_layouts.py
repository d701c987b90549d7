"""A run goes on with another number of ranks and at another ZeRO stage: to 1e-6 what it would have come to."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.jobs import metrics, sharded, trained, write_job
from tests.distributed.ranks import run
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

ANSWERS = {"refresh_every": 4, "answers_per_step": 4, "questions_per_refresh": 6}
ROUNDS = {"reward": "accuracy", "group_size": 4, "steps_per_round": 2}
RUNS = {  # sections; the checkpoint at step 3 is inside a log interval and, of rollouts, inside a round
    "full": {
        "training": {"average_last": 0.7},
        "penalties": [{"name": name, **ANSWERS} for name in ("mmce", "calibration_aware")],
    },
    "lora": {"model": {"lora": {"r": 2}}, "penalties": []},
    "grpo": {"model": {"lora": {"r": 2}}, "objective": {"name": "grpo"}, "rollouts": ROUNDS, "penalties": []},
    "ppo": {
        "objective": {"name": "ppo", "value_model": "own", "value_learning_rate": 3e-3},
        "rollouts": {**ROUNDS, "truncated": "graded"},
        "confidence_head": {"trains_backbone": True, "layers": [0, 2], "fit_questions": 8},
        "penalties": [],
    },
}
LAYOUTS = {"1x1": (1, 1), "2x0": (2, 0), "2x3": (2, 3), "4x2": (4, 2), "1x0": (1, 0)}
"""Ranks and ZeRO stage."""
CHANGES = (("2x3", "1x1"), ("2x3", "2x0"), ("2x3", "4x2"), ("1x0", "2x3"), ("4x2", "2x3"))
"""From and to; the last goes on from what the third went on to."""


def job(folder, kind, layout, name, **training):
    """Config of a run, of six steps with a checkpoint after three."""
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in RUNS[kind].items()}
    stage = LAYOUTS[layout][1]
    training = {
        "zero_stage": stage, "checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 4, "deepspeed": None,
        **sections.pop("training", {}), **training,
    }  # fmt: skip
    if stage == 3:
        training["deepspeed"] = sharded(folder)
    model = {"source": str(folder / ("untied" if kind == "full" else "tiny")), **sections.pop("model", {})}
    path = write_job(folder, name, training=training, model=model, **sections)
    config = yaml.safe_load(path.read_text())
    if "rollouts" in sections:
        config["evaluation"]["max_new_tokens"] = 1
    if "confidence_head" in sections:
        config["task"] = {"kind": "short_answer", "match": "exact_match"}
    path.write_text(yaml.safe_dump(config))
    return path


def questions(folder):
    """Half of the tokens are right, whatever a policy says."""
    tokenizer = tiny_tokenizer()
    texts = [[tokenizer.decode([token]).strip() for token in range(k, len(tokenizer), 2)] for k in (4, 5)]
    rows = [{"question": f"What is {i}?", "answers": [text for text in texts[i % 2] if text]} for i in range(800)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")

    def go(layout, *paths):
        ended = run(trained(LAYOUTS[layout][0], *paths), folder, 500)
        assert ended.code == 0, ended.output[-6000:]
        return ended.output

    job(folder, "full", "2x3", "first")
    questions(folder)
    for layout in ("2x3", "1x0"):
        go(layout, *(job(folder, kind, layout, f"{kind}-{layout}") for kind in RUNS))
    told = {}
    for old, new in CHANGES:
        names = {kind: f"{kind}-{old}" if old != "4x2" else f"{kind}-2x3-4x2" for kind in RUNS}
        paths = []
        for kind, name in names.items():
            last = max((folder / name / "checkpoints").glob("step-*"))
            before = last if last.name == "step-0000003" or old == "4x2" else last.with_name("step-0000003")
            paths.append(job(folder, kind, new, f"{name}-{new}", resume=str(before)))
        told[old, new] = go(new, *paths)
    return folder, told


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(("old", "new"), CHANGES[:4])
def test_the_run_comes_to_what_it_would_have(runs, kind, old, new):
    folder, _ = runs
    whole, name = f"{kind}-{old}", f"{kind}-{old}-{new}"
    expected, found = (load_file(folder / one / "model" / "model.safetensors") for one in (whole, name))
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert torch.allclose(found[key], one, rtol=0, atol=1e-6), (key, (found[key] - one).abs().max())
    start = load_file(folder / ("untied" if kind == "full" else "tiny") / "model.safetensors")
    assert any(float((start[key] - one).abs().max()) > 1e-4 for key, one in expected.items())
    lines, again = (
        {line["step"]: line for line in metrics(folder / one) if line["event"] == "log"} for one in (whole, name)
    )
    for step in (4, 6):  # the first log has what was summed before the checkpoint, on ranks that are no more
        for key, value in lines[step].items():
            if isinstance(value, float) and not any(word in key for word in ("tflops", "waiting", "mfu", "gib")):
                assert again[step][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key)


def test_a_finished_run_laid_out_anew_is_exported_again(runs):
    folder, _ = runs
    for kind in RUNS:
        expected, found = (
            load_file(folder / name / "model" / "model.safetensors")
            for name in (f"{kind}-2x3-4x2", f"{kind}-2x3-4x2-2x3")
        )
        assert all(torch.allclose(found[key], one, rtol=0, atol=1e-6) for key, one in expected.items())


def test_what_changed_is_told_and_kept(runs):
    folder, told = runs
    assert "the same run in another layout, after step 3: 2 process(es) before, 1 now" in told["2x3", "1x1"]
    run_file = folder / "full-2x3-1x1" / "checkpoints" / "step-0000006" / "run.json"
    changes = json.loads(run_file.read_text())["changes"]
    assert changes[0] == "after step 3: 2 process(es) before, 1 now"
    assert "after step 3: training.zero_stage was 3, is 1" in changes


def test_a_checkpoint_without_one_of_its_files_is_told(runs):
    folder, _ = runs
    damaged = folder / "damaged"
    shutil.copytree(folder / "lora-2x3" / "checkpoints" / "step-0000003", damaged)
    (damaged / "files.json").unlink()  # by which it is found out before anything is loaded
    (damaged / "engine" / "rank-00001.safetensors").unlink()
    path = job(folder, "lora", "1x1", "of-damaged", resume=str(damaged))
    ended = run(trained(1, path), folder, 300)
    assert ended.code
    assert "engine holds 1 of 2 files: its shards are not whole" in ended.output

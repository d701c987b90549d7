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

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

ANSWERS = {"refresh_every": 4, "answers_per_step": 4, "questions_per_refresh": 6}
ROUNDS = {"reward": "accuracy", "group_size": 4, "steps_per_round": 2}
KINDS = {  # sections; the checkpoint at step 3 is inside a log interval and, of rollouts, inside a round
    "full": {
        "training": {"average_last": 0.7},
        "penalties": [{"name": name, **ANSWERS} for name in ("mmce", "calibration_aware")],
    },
    "lora": {"model": {"lora": {"r": 2}}, "penalties": []},
    "bf16": {"model": {"dtype": "bf16"}, "penalties": []},
    "grpo": {"model": {"lora": {"r": 2}}, "objective": {"name": "grpo"}, "rollouts": ROUNDS, "penalties": []},
    "ppo": {
        "objective": {"name": "ppo", "value_model": "own", "value_learning_rate": 3e-3},
        "rollouts": {**ROUNDS, "truncated": "graded"},
        "confidence_head": {"trains_backbone": True, "layers": [0, 2], "fit_questions": 8},
        "penalties": [],
    },
}
LAYOUTS = {  # ranks, training
    "1x0": (1, {"zero_stage": 0}),
    "1x1": (1, {"zero_stage": 1, "micro_batch_size": 2}),
    "2x0": (2, {"zero_stage": 0}),
    "2x2": (2, {"zero_stage": 2}),
    "2x2-offload": (2, {"zero_stage": 2, "offload_optimizer": True}),
    "2x3": (2, {"zero_stage": 3}),
    "4x2": (4, {"zero_stage": 2}),
}
WHOLE = {"2x3": ("full", "lora", "grpo", "ppo"), "2x2": ("bf16",), "1x0": ("full", "ppo")}
CHANGES = (  # kind, from, to
    *((kind, "2x3", "1x1") for kind in WHOLE["2x3"]),
    *((kind, "2x3", layout) for kind in ("full", "lora") for layout in ("2x0", "2x2-offload", "4x2")),
    *((kind, "1x0", "2x3") for kind in WHOLE["1x0"]),
)
AT_THE_END = (("bf16", "2x2", "1x1"), ("bf16", "2x2", "2x3"), ("full", "2x3-4x2", "2x3"))
"""From the last step: what is exported is what was trained, without rounding."""


def job(folder, kind, layout, name, resume=None):
    """Config of a run of six steps with a checkpoint after three."""
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in KINDS[kind].items()}
    training = {"checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 4, "resume": resume, "deepspeed": None}
    training |= sections.pop("training", {}) | LAYOUTS[layout][1]
    if training["zero_stage"] == 3:
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
    """Whole runs and those that went on from them, in as few launches as may be: what each name ended with."""
    folder = tmp_path_factory.mktemp("layouts")
    job(folder, "full", "2x3", "first")
    questions(folder)
    told = {}

    def launch(ranks, *wanted):
        paths = [path for layout, path in wanted if LAYOUTS[layout][0] == ranks]
        ended = run(trained(ranks, *paths), folder, 900)
        assert ended.code == 0, ended.output[-6000:]
        told.update({path.stem: ended.output for path in paths})

    def gone_on(kind, old, new, step=3):
        before = folder / f"{kind}-{old}" / "checkpoints" / f"step-{step:07d}"
        return new, job(folder, kind, new, f"{kind}-{old}-{new}", str(before))

    whole = [
        (layout, job(folder, kind, layout, f"{kind}-{layout}")) for layout, kinds in WHOLE.items() for kind in kinds
    ]
    others = [gone_on(*change) for change in CHANGES]
    last = [gone_on(*change, step=6) for change in AT_THE_END]
    launch(2, *whole)
    launch(1, *whole, *others, *last)
    launch(4, *others)
    launch(2, *others, *last)
    return folder, told


def exported(folder, name):
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.mark.parametrize(("kind", "old", "new"), CHANGES)
def test_the_run_comes_to_what_it_would_have(runs, kind, old, new):
    folder, _ = runs
    whole, name = f"{kind}-{old}", f"{kind}-{old}-{new}"
    expected, found = exported(folder, whole), exported(folder, name)
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
                assert again[step][key] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, key)


@pytest.mark.parametrize(("kind", "old", "new"), AT_THE_END)
def test_what_was_trained_is_exported_as_it_was(runs, kind, old, new):
    folder, _ = runs
    expected, found = exported(folder, f"{kind}-{old}"), exported(folder, f"{kind}-{old}-{new}")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], one) for key, one in expected.items())


def test_what_changed_is_told_and_kept(runs):
    folder, told = runs
    assert "the same run in another layout, after step 3: 2 process(es) before, 1 now" in told["full-2x3-1x1"]
    run_file = folder / "full-2x3-1x1" / "checkpoints" / "step-0000006" / "run.json"
    changes = json.loads(run_file.read_text())["changes"]
    assert [one.partition(" was ")[0] for one in changes] == [
        "after step 3: 2 process(es) before, 1 now",
        "after step 3: training.micro_batch_size",
        "after step 3: training.zero_stage",
        "after step 3: training.deepspeed",
    ]


def test_a_checkpoint_without_one_of_its_files_is_told(runs):
    folder, _ = runs
    damaged = folder / "damaged"
    shutil.copytree(folder / "lora-2x3" / "checkpoints" / "step-0000003", damaged)
    (damaged / "files.json").unlink()  # by which it is found out before anything is loaded
    (damaged / "engine" / "rank-00001.safetensors").unlink()
    ended = run(trained(1, job(folder, "lora", "1x1", "of-damaged", resume=str(damaged))), folder, 300)
    assert ended.code
    assert "engine holds 1 of 2 files: its shards are not whole" in ended.output

"""A run killed with SIGKILL at a random step continues bit for bit, and laid out anew up to rounding."""

import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.errors import UserError
from calibtrain.pipeline.spectra import at_step
from tests.distributed.jobs import TRAIN, metrics, train, trained, write_job
from tests.distributed.ranks import environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STAGES = (0, 1, 2, 3)
ANSWERS = {"refresh_every": 4, "answers_per_step": 4, "questions_per_refresh": 6}
EXTRA = {  # what else must be restored: dropout's random numbers, bf16's fp32 masters, averages, and what losses keep
    0: {},
    1: {"model": {"lora": {"r": 2, "dropout": 0.3}}},
    2: {
        "model": {"dtype": "bf16"},
        "training": {"average_last": 0.7},
        "objective": {"name": "refusal", "relabel_every": 4},
    },
    3: {
        "model": {"source": "untied"},
        "training": {"average_last": 0.7},
        "penalties": [{"name": name, **ANSWERS} for name in ("mmce", "calibration_aware", "correctness_query")],
    },
}
EXTRA[3]["penalties"][2]["choices"] = ["In", "of"]  # single tokens of the tiny tokenizer
KILL_AFTER = random.Random(20260101)  # seeded: the steps are the same in every run of the suite


def job(folder, name, stage):
    sections = dict(EXTRA[stage])
    model = {"dtype": "fp32", "source": "tiny", **sections.pop("model", {})}
    model["source"] = str(folder / model["source"])
    training = {"zero_stage": stage, **sections.pop("training", {})}
    return write_job(
        folder, name, model=model, training=training, tracking={"wandb": True, "mode": "offline"}, **sections
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs of every stage; killed ones; and the killed ones resumed, with two that had already ended."""
    folder = tmp_path_factory.mktemp("resume")
    env = environment(WANDB_SILENT="true")
    without_term = write_job(folder, "without_term", training={"zero_stage": 0}, penalties=[])
    # Its first pass through the model on resume is the one that answers, after the last step.
    no_export = write_job(
        folder, "no_export", model={"source": str(folder / "untied")}, training={"zero_stage": 3, "max_steps": 2}
    )
    whole = [job(folder, f"whole{stage}", stage) for stage in STAGES]
    ended = run(trained(2, *whole, without_term, no_export), folder, 400, env)
    assert ended.code == 0, ended.output[-6000:]
    (folder / "no_export" / "model").rename(folder / "exported")
    killed = {}
    for stage in STAGES:
        config, step = job(folder, f"killed{stage}", stage), KILL_AFTER.randint(2, 5)
        print(f"stage {stage} is killed after step {step}")
        output, slow = folder / f"killed{stage}", environment(WANDB_SILENT="true")
        ended = run(train(2, config), folder, env=slow, watch=lambda _, o=output, s=step: logged(o) >= s)
        newest = sorted((output / "checkpoints").glob("step-???????/rank0.json"))[-1]
        wandb_id = json.loads(newest.read_text())["hooks"]["wandb"]["run_id"]
        killed[stage] = (ended.code, logged(output), wandb_id)
        assert not (output / "model").exists(), "the run ended before it could be killed"
    again = [folder / f"killed{stage}.yaml" for stage in STAGES]
    before = contents(folder / "whole0")
    ended = run([*trained(2, *again, whole[0], no_export), "training.resume=auto"], folder, 400, env)
    assert ended.code == 0, ended.output[-6000:]
    assert contents(folder / "whole0") == before
    assert ended.output.count("it is finished: nothing to train") == 1
    return folder, killed


def contents(output):
    """Every file of a run and when it was written."""
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


def logged(output):
    """Steps that the run has logged, once it has a checkpoint."""
    path = output / "metrics.jsonl"
    if not path.is_file() or not list((output / "checkpoints").glob("step-???????/run.json")):
        return 0
    return max((one["step"] for one in map(parse, path.read_text().splitlines())), default=0)


def parse(line):
    try:
        return json.loads(line)
    except ValueError:
        return {"step": 0}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_continues_bit_for_bit(runs, stage):
    folder, killed = runs
    assert killed[stage][0] != 0
    assert killed[stage][1] >= 2
    whole, resumed = metrics(folder / f"whole{stage}"), metrics(folder / f"killed{stage}")
    assert [line["step"] for line in whole if line["event"] == "log"] == [1, 2, 3, 4, 5, 6]
    assert any("loss" in key for key in whole[0])
    assert resumed == whole
    expected = load_file(folder / f"whole{stage}" / "model" / "model.safetensors")
    found = load_file(folder / f"killed{stage}" / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    start = load_file(folder / EXTRA[stage].get("model", {}).get("source", "tiny") / "model.safetensors")
    assert any(not start[name].to(found[name].dtype).equal(found[name]) for name in start)


def test_a_finished_run_without_its_export_is_exported_again(runs):
    folder, _ = runs
    expected, found = (
        load_file(path / "model.safetensors") for path in (folder / "exported", folder / "no_export" / "model")
    )
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.parametrize("stage", STAGES)
def test_one_wandb_run_however_often_it_is_started(runs, stage):
    folder, killed = runs
    files = list((folder / f"killed{stage}" / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{killed[stage][2]}"}  # the id that the killed run had
    assert len(list((folder / f"whole{stage}" / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_wandb_file_of_two_ranks_holds_the_keys_in_step_order(runs):
    from tests.wandb_file import history

    folder, _ = runs
    (path,) = (folder / "whole0" / "wandb").glob("offline-run-*/*.wandb")
    rows = history(path)
    steps = [row["train/step"] for row in rows]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2, 3, 4, 5, 6}
    keys = {key for row in rows for key in row}
    assert {"train/loss/nll", "train/lr", "train/grad_norm", "calib/train/token/ece15"} <= keys
    assert "calib/calibration/likelihood/acc" in keys
    logged_lines = {line["step"]: line for line in metrics(folder / "whole0") if line["event"] == "log"}
    first = next(row for row in rows if "train/loss/nll" in row)
    assert first["train/loss/nll"] == pytest.approx(logged_lines[1]["train/loss/nll"])


@pytest.mark.parametrize(
    ("name", "last"), [("whole0", 6), ("whole1", 6), ("no_export", 2)]
)  # 2 and 3 export an average
def test_the_last_checkpoint_compared_by_step_is_what_was_exported(runs, name, last):
    """Whole weights come out of every stage's shards, an adapter merged, with nothing rounded on the way."""
    folder = runs[0]
    with at_step(folder / name, last) as compared:
        found = load_file(compared.tuned / "model.safetensors")
    exported = load_file(folder / name / "model" / "model.safetensors")
    assert found.keys() == exported.keys()
    matrices = [name for name, one in exported.items() if "layers" in name and one.ndim == 2]
    assert matrices
    # What is no matrix may hold the logit scale, which is the export's alone.
    assert all(torch.allclose(found[name], exported[name], atol=1e-6) for name in matrices)
    assert not compared.tuned.exists()
    with (
        pytest.raises(UserError, match=f"no whole checkpoint of it; there are: {'4, 6' if last == 6 else 2}"),
        at_step(folder / name, 5),
    ):
        pass


def test_the_calibration_term_leaves_the_trajectory_as_it_was(runs):
    folder, _ = runs
    keys = ("step", "train/loss/nll", "train/grad_norm", "calib/train/token/ece15")
    found, expected = (
        [[line[key] for key in keys] for line in metrics(folder / name) if line["event"] == "log"]
        for name in ("whole0", "without_term")
    )
    assert len(found) == 6
    assert found == expected


def test_another_number_of_ranks_and_stage_comes_to_the_same_weights(runs):
    """From step 4 on: ZeRO-3 in parts to ZeRO-1 on one rank, with the averages and what the losses keep."""
    folder, _ = runs
    elsewhere = f"output_dir={folder / 'elsewhere'}", f"training.resume={folder / 'whole3/checkpoints/step-0000004'}"
    stage = "training.zero_stage=1", "training.deepspeed=null", "training.micro_batch_size=2", "tracking.wandb=false"
    ended = run([sys.executable, *TRAIN, str(folder / "whole3.yaml"), *elsewhere, *stage], folder)
    assert ended.code == 0, ended.output[-3000:]
    assert "the same run in another layout, after step 4: 2 process(es) before, 1 now" in ended.output
    expected, found = (load_file(folder / one / "model" / "model.safetensors") for one in ("whole3", "elsewhere"))
    assert all(torch.allclose(found[name], one, rtol=0, atol=1e-6) for name, one in expected.items())
    start = load_file(folder / "untied" / "model.safetensors")
    assert any(float((one - start[name]).abs().max()) > 1e-4 for name, one in expected.items())

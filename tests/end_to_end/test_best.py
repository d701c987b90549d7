"""The weights of the best evaluation are exported, and a run that gets no better ends."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import state_of
from calibtrain.config_file import load_config
from calibtrain.config_training import _better
from calibtrain.errors import UserError
from calibtrain.pipeline.check import check
from calibtrain.training.checkpoint import complete_checkpoints
from tests.distributed.jobs import metrics, sharded, write_job

SIZES = {"train": 16, "validation": 12, "calibration": 6, "temperature": 4, "certification": 4, "test": 4}
BEST = {"patience": 2}
# At such a rate the loss on other rows soon rises for a while.
TRAINING = {
    "max_steps": 12,
    "checkpoint_every": None,
    "evaluate_loss_every": 1,
    "learning_rate": 3e-2,
    "schedule": "constant",
    "log_every": 5,
}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    os.environ["DS_ACCELERATOR"] = "cpu"


def job(folder, name, **training):
    return write_job(folder, name, data={"splits": SIZES}, training={**TRAINING, **training}, penalties=[])


def losses(folder):
    lines = [line for line in metrics(folder) if line["event"] == "evaluation" and line["split"] == "validation"]
    return [(line["step"], line["eval/loss"]) for line in lines]


def test_the_best_weights_are_exported_and_what_gets_no_better_ends(tmp_path):
    from calibtrain.pipeline import train

    engine = {"zero_stage": 3, "deepspeed": sharded(tmp_path)}
    model = train.run(load_config(job(tmp_path, "run", best=BEST, **engine)))
    *measured, exported = losses(tmp_path / "run")
    value, best = min((value, step) for step, value in measured)
    assert 1 < best < 10
    assert [step for step, _ in measured] == list(range(1, best + 3))  # two evaluations behind it were no better
    logged = [line["step"] for line in metrics(tmp_path / "run") if line["event"] == "log"]
    assert logged == sorted({*range(5, best + 2, 5), best + 2})  # what came behind the last interval is told, too
    assert exported == (best + 2, pytest.approx(value, rel=1e-6))  # behind the last step, of the weights before it

    plain = train.run(load_config(job(tmp_path, "plain", **engine | {"max_steps": best})))
    wanted, found = (load_file(one / "model.safetensors") for one in (plain, model))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    # Killed behind the best one: the checkpoint knows how good it was, and the run comes to the same end.
    *_, kept = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert json.loads((kept / "run.json").read_text())["best"] == {"value": value, "step": best, "behind": 0}
    shutil.rmtree(model)
    again = train.run(load_config(tmp_path / "run.yaml", ["training.resume=auto"]))
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert losses(tmp_path / "run") == [*measured, exported]


def test_a_best_step_that_could_not_be_kept_is_not_gone_back_to(tmp_path, monkeypatch):
    from calibtrain.pipeline import train
    from calibtrain.training import trainer

    saved = trainer.end_checkpoint
    full = {4, 5, 6}

    def end(writing, world, **how):
        return (True, None) if writing.step in full else saved(writing, world, **how)

    monkeypatch.setattr(trainer, "end_checkpoint", end)
    train.run(load_config(job(tmp_path, "run", best={}, max_steps=8, zero_stage=1)))
    *measured, (_, exported) = losses(tmp_path / "run")
    assert exported == pytest.approx(min(value for step, value in measured if step not in full), rel=1e-6)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"best": {"metric": "train/loss"}}, "train/loss is no metric of an evaluation"),
        ({"best": {"metric": "eval/loss"}, "evaluate_loss_every": None}, "set training.evaluate_loss_every"),
        ({"best": {"metric": "calib/calibration/likelihood/brier"}}, "set training.evaluate_every"),
        ({"best": {}, "average_last": 0.5}, "set one of them"),
        (
            {"best": {"metric": "calib/calibration/likelihood/auroc"}, "evaluate_every": 2},
            "the highest is best, and lowest is asked for: set goal: highest",
        ),
        ({"best": {"goal": "highest"}}, "of eval/loss the lowest is best, and highest is asked for: set goal: lowest"),
        *(
            (
                {"best": {"metric": f"calib/calibration/likelihood/{name}", "goal": "highest"}, "evaluate_every": 2},
                f"likelihood/{name} the lowest is best",
            )
            for name in ("brier", "risk@0.5")
        ),
    ],
)
def test_what_cannot_be_found_best_is_told_before(tmp_path, training, message):
    with pytest.raises(UserError, match=message):
        load_config(job(tmp_path, "run", zero_stage=1, **training))


def test_of_every_metric_it_is_known_which_value_is_best():
    """Or that neither is: a metric that is added later says so here."""
    neither = {"n", "mean_conf", "gap", "ece_null", "unc", "clip_n", "auroc_err", "aurc_err", "augrc_err"}
    names = summary(state_of(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 1.0])))
    assert {name for name in names if _better(f"calib/calibration/likelihood/{name}") is None} == neither


@pytest.mark.parametrize(
    ("metric", "message"),
    [("eval/loss/orpo", "there are eval/loss, eval/loss/nll"), ("calib/calibration/brier", "brier,")],
)
def test_a_metric_that_nothing_measures_is_told_before_the_first_step(tmp_path, metric, message):
    from calibtrain.pipeline import train

    with pytest.raises(UserError, match=rf"{metric} is not measured.*{message}"):
        train.run(load_config(job(tmp_path, "run", best={"metric": metric}, evaluate_every=2, zero_stage=1)))
    if metric.startswith("calib/"):  # before a model is loaded
        with pytest.raises(UserError, match=f"{metric} is not measured"):
            check(load_config(tmp_path / "run.yaml"), 1)
    assert not (tmp_path / "run" / "checkpoints").exists()

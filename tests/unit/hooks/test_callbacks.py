"""Our calibration in other trainers' logs: the numbers of our own hook, once an interval, merged over ranks."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from calibtrain.distributed import leave_world
from calibtrain.errors import UserError
from calibtrain.hooks.base import HookList
from calibtrain.hooks.calibration import CalibrationHook
from calibtrain.hooks.callback import AnswerMeter, CalibrationMeter, stats_from_logits
from calibtrain.hooks.records import MicroBatchRecord
from calibtrain.losses import batch_from_labels, token_stats_from_model
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [{"question": f"What is {i}?", "answers": [str(i)]} for i in range(5)]


def inputs(seed, rows=3):
    ids = torch.randint(3, 400, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100)}


def measured(seed):
    batch = batch_from_labels(**inputs(seed))
    with torch.no_grad():
        return token_stats_from_model(tiny_model(), batch), batch


def test_meter_gives_the_hooks_numbers_and_starts_anew():
    meter, hooks = CalibrationMeter(), HookList([CalibrationHook()])
    for seed in (0, 1):
        stats, batch = measured(seed)
        meter.update(stats, batch)
        fields = {"roles": batch.roles, "sequence_correct": batch.correct, "pair_ids": batch.pair_ids}
        record = MicroBatchRecord(
            *stats, sequence_ids=batch.sequence_ids, is_completion=batch.is_completion, term_sums={}, term_counts={},
            **fields,
        )  # fmt: skip
        hooks.dispatch("on_micro_batch", record)
    found = meter.compute(1)
    assert found.keys() == (expected := hooks.reduce_and_log(1, 1)).keys()
    assert all(found[key] == value or math.isnan(value) for key, value in expected.items())
    assert found["train/token/n"] == 2 * 3 * 6
    assert "train/token/n" not in meter.compute(2)


def test_statistics_of_logits_are_those_of_the_head():
    model, batch = tiny_model(), batch_from_labels(**inputs(0))
    with torch.no_grad():
        logits = model(batch.input_ids).logits
    found, expected = stats_from_logits(logits, batch), token_stats_from_model(model, batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach())
    with pytest.raises(UserError, match="do not belong"):
        stats_from_logits(logits[:, :-1], batch)
    nothing = batch_from_labels(inputs(0)["input_ids"], torch.full((3, 9), -100))
    assert stats_from_logits(logits, nothing).logprob.shape == (0,)


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    meter, answers = CalibrationMeter(), AnswerMeter(QUESTIONS)
    for seed in (0, 1, 2) if rank == 0 else (3,):
        meter.update(*measured(seed))
    result = {"tokens": meter.compute(1), "answers": answers(tiny_model(), tiny_tokenizer())}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    leave_world()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_two_ranks_report_what_one_would(tmp_path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = CalibrationMeter()
    for seed in range(4):
        alone.update(*measured(seed))
    expected = {"tokens": alone.compute(1), "answers": AnswerMeter(QUESTIONS)(tiny_model(), tiny_tokenizer())}
    for kind, numbers in expected.items():
        assert first[kind].keys() == second[kind].keys() == numbers.keys()
        for key, value in numbers.items():
            for found in (first[kind][key], second[kind][key]):
                assert found == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), key
    assert first["answers"]["calib/calibration/likelihood/n"] == 5


def test_questions_must_be_gradable():
    with pytest.raises(UserError, match=r"questions\[1\]: `answers` is missing"):
        AnswerMeter([QUESTIONS[0], {"prompt": "What?", "completion": "that"}])


def trainer(tmp_path, callback=None, **arguments):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tracker(TrainerCallback):
        rows: list

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append((state.global_step, dict(logs)))

    rows = [{name: tensor[0] for name, tensor in inputs(seed, 1).items()} for seed in range(8)]
    settings = {"max_steps": 4, "logging_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    tracker = Tracker()
    tracker.rows = []
    made = Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tiny_tokenizer(),
        callbacks=[tracker, *([] if callback is None else [callback])],
    )
    return made, tracker.rows


def test_a_plain_hugging_face_trainer(tmp_path):
    from calibtrain.hooks.callback_huggingface import CalibrationCallback

    made, rows = trainer(tmp_path, eval_strategy="steps", eval_steps=4, prediction_loss_only=True)
    callback = CalibrationCallback(QUESTIONS).attach(made)
    made.train()
    training = [(step, row) for step, row in rows if "loss" in row]
    assert [step for step, _ in training] == [2, 4]
    meter = CalibrationMeter()
    meter.update(*measured(0))
    keys = meter.compute(1).keys()  # of our own hook
    for _, row in training:
        assert {key for key in row if key.startswith(("calib/", "train/"))} == keys
        # Two steps of two rows of six labels: evaluation passes are not counted, nothing twice.
        assert row["train/token/n"] == 2 * 2 * 6
        assert row["loss"] == pytest.approx(-row["train/token/logprob"], rel=1e-4)
        assert "calib/train/token/ece15" in row
    evaluations = [row for _, row in rows if "eval_loss" in row]
    assert len(evaluations) == 1
    assert evaluations[0]["calib/calibration/likelihood/n"] == 5
    assert next(row for row in made.state.log_history if "loss" in row).keys() >= training[0][1].keys()
    assert made.evaluate()["eval_calib/calibration/likelihood/n"] == 5
    assert callback._handle is None
    assert not made.model._forward_hooks


def test_a_callback_that_comes_too_late_or_sees_nothing_says_so(tmp_path, caplog):
    from calibtrain.hooks.callback_huggingface import CalibrationCallback

    made, _ = trainer(tmp_path, CalibrationCallback())
    with pytest.raises(UserError, match="attach"):
        made.train()

    made, rows = trainer(tmp_path)
    made.model.register_forward_hook(lambda module, args, output: type(output)(loss=output.loss))
    CalibrationCallback().attach(made)
    with caplog.at_level(logging.WARNING, "calibtrain"):
        made.train()
    assert sum("call update(stats, batch)" in message for message in caplog.messages) == 1
    assert not any("train/token/n" in row for _, row in rows)

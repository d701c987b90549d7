"""The measuring hooks against sums done by hand."""

import math
from dataclasses import replace

import pytest
import torch

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import state_of
from calibtrain.config import RunConfig
from calibtrain.hooks.base import HookList
from calibtrain.hooks.calibration import CalibrationHook
from calibtrain.hooks.factory import default_hooks
from calibtrain.hooks.records import MicroBatchRecord, StepCost, StepRecord
from calibtrain.hooks.training import TrainingHook
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED, LossTerm
from calibtrain.training.losses import measure_names, term_names


def micro_batch(seed=0):
    """Three tokens each of a chosen, a rejected, an own right and an own ungraded sequence; token 0 is a prompt's."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(12, generator=g) * 0.9 + 0.05
    is_completion = torch.ones(12, dtype=torch.bool)
    is_completion[0] = False
    return MicroBatchRecord(
        logprob=confidence.log() - 0.1,
        entropy=torch.rand(12, generator=g),
        sum_p2=confidence**2,
        confidence=confidence,
        correct=torch.rand(12, generator=g) > 0.4,
        sequence_ids=torch.arange(4).repeat_interleave(3),
        is_completion=is_completion,
        roles=torch.tensor([CHOSEN, REJECTED, ANSWER, ANSWER]),
        sequence_correct=torch.tensor([math.nan, math.nan, 1.0, math.nan]),
        term_sums={"nll": torch.tensor(6.0), "odds_ratio": torch.tensor(1.0)},
        term_counts={"nll": torch.tensor(2), "odds_ratio": torch.tensor(1)},
        pair_ids=torch.tensor([0, 0, -1, -1]),
    )


def test_calibration_of_tokens_answers_and_preferences():
    records = [micro_batch(seed) for seed in range(5)]
    hook = CalibrationHook()
    for record in records:
        hook.on_micro_batch(record)
    metrics = HookList([hook]).reduce_and_log(1, 1)
    token = summary(
        state_of(torch.cat([r.confidence[1:3] for r in records]), torch.cat([r.correct[1:3] for r in records]))
    )
    answer = summary(state_of(torch.stack([r.logprob[6:9].double().sum().exp() for r in records]), torch.ones(5)))
    for kind, reference in {"token": token, "answer": answer}.items():
        for key, value in reference.items():
            assert metrics[f"calib/train/{kind}/{key}"] == pytest.approx(value, nan_ok=True)
    chosen = [r.logprob[1:3].double().mean().item() for r in records]
    rejected = [r.logprob[3:6].double().mean().item() for r in records]
    odds = [c - math.log1p(-math.exp(c)) - r + math.log1p(-math.exp(r)) for c, r in zip(chosen, rejected, strict=True)]
    assert metrics["train/preference/chosen_logprob"] == pytest.approx(sum(chosen) / 5)
    assert metrics["train/preference/log_odds_ratio"] == pytest.approx(sum(odds) / 5)
    assert metrics["train/preference/accuracy"] == sum(o > 0 for o in odds) / 5
    assert metrics["train/token/n"] == 10


def test_an_overflowed_forward_pass_does_not_end_the_measuring():
    record = micro_batch()
    record.confidence[1] = math.nan
    hook = CalibrationHook()
    hook.on_micro_batch(record)
    hooks = HookList([hook])
    assert hooks.reduce_and_log(1, 1)["calib/train/token/n"] == 1
    assert not hooks.disabled


def test_training_hook_means_and_resume():
    step = StepRecord(1, 2, 0.5, 1e-4, 0.7, False, 2.0, 100, None)

    def run(hook):
        hook.on_micro_batch(micro_batch())
        hook.on_step(step)
        return hook

    whole = run(run(TrainingHook(["odds_ratio", "nll"])))
    resumed = TrainingHook(["nll", "odds_ratio"])
    resumed.load_state_dict(run(TrainingHook(["nll", "odds_ratio"])).state_dict())
    metrics = HookList([whole]).reduce_and_log(2, 2)
    assert HookList([run(resumed)]).reduce_and_log(2, 2) == metrics
    assert metrics["train/loss/nll"] == 3.0
    assert metrics["train/loss/odds_ratio"] == 1.0
    assert metrics["train/tokens_per_second"] == 50
    assert metrics["train/lr"] == 1e-4
    assert "train/logit_scale" not in metrics


def test_what_a_step_costs():
    def metrics(*costs):
        hook = TrainingHook(["odds_ratio", "nll"])
        for cost in costs:
            hook.on_step(StepRecord(1, 2, 0.5, 1e-4, 0.7, False, 2.0, 100, None, cost=cost))
        return HookList([hook]).reduce_and_log(2, 2)

    gpu = StepCost(flops=3e12, data_seconds=0.5, device_bytes=2**31, peak=4e12)
    found = metrics(gpu, StepCost(5e12, 0.25, None, 2**32, 4e12))
    assert found["train/tflops_per_second_and_device"] == 2.0
    assert found["train/mfu"] == 0.5
    assert found["train/device_gib"] == 4.0  # the most so far
    assert found["train/seconds_for_data"] == 0.375
    assert "train/seconds_waiting" not in found
    cpu = metrics(StepCost(flops=3e12, waiting_seconds=0.5), StepCost(flops=3e12, waiting_seconds=1.0))
    assert cpu["train/seconds_waiting"] == 0.75
    assert not {"train/mfu", "train/device_gib"} & cpu.keys()  # no peak is invented
    resumed, whole = TrainingHook(["nll"]), TrainingHook(["nll"])
    whole.on_step(StepRecord(1, 2, 0.5, 1e-4, 0.7, False, 2.0, 100, None, cost=gpu))
    earlier = {key: value for key, value in whole.state_dict().items() if key != "cost"}
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.sums()["cost"], whole.sums()["cost"])
    resumed.load_state_dict(earlier)  # of a version that counted nothing


def test_measures_are_means_over_what_they_count_and_survive_a_resume():
    def term(total, count):
        return LossTerm(torch.tensor(total), torch.tensor(count))

    def hook():
        return TrainingHook(["nll", "odds_ratio"], ["ratio", "clip_share"])

    first = replace(micro_batch(), measures={"ratio": term(3.3, 3), "clip_share": term(1.0, 3)})
    second = replace(micro_batch(), measures={"ratio": term(0.9, 1), "clip_share": term(1.0, 1)})
    whole, part, resumed = hook(), hook(), hook()
    for one, record in ((whole, first), (whole, second), (part, first)):
        one.on_micro_batch(record)
    resumed.load_state_dict(part.state_dict())
    resumed.on_micro_batch(second)
    for one in (whole, resumed):
        metrics = HookList([one]).reduce_and_log(1, 1)
        assert metrics["train/policy/ratio"] == pytest.approx(1.05)
        assert metrics["train/policy/clip_share"] == pytest.approx(0.5)
    earlier = {key: value for key, value in part.state_dict().items() if key != "measured"}
    hook().load_state_dict(earlier)  # of a version that measured nothing


def test_measure_names_are_those_of_the_objective():
    assert measure_names(RunConfig(objective={"name": "sft"})) == []
    found = measure_names(RunConfig(objective={"name": "ppo"}))
    assert {"clip_share", "entropy", "ratio", "value_clip_share"} <= set(found)


def test_term_names_leave_out_what_is_not_in_the_loss():
    moves = [RunConfig(penalties=[{"name": "answer_score", "moves": moves}]) for moves in ("all", "scale")]
    assert [term_names(config) for config in moves] == [["answer_score", "nll", "odds_ratio"], ["nll", "odds_ratio"]]


def test_default_hooks_by_rank():
    names = [[hook.name for hook in default_hooks(RunConfig(), rank, ["nll"])] for rank in (0, 3)]
    assert names == [["training", "calibration", "jsonl", "progress", "wandb"], ["training", "calibration"]]

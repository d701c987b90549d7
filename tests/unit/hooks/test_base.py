"""HookList: events, failing hooks, state."""

import logging
from pathlib import Path

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.hooks.base import EVENTS, Hook, HookList
from calibtrain.hooks.records import EndRecord, LogRecord, RunRecord

RUN = RunRecord(config={}, output_dir=Path("out"), total_steps=2, first_step=0, rank=0, world_size=1)


class Counter(Hook):
    name = "counter"

    def __init__(self):
        self.total = torch.zeros(2, dtype=torch.float64)
        self.logs = []
        self.fail = ""

    def on_start(self, record):
        self.total += 1
        if self.fail == "on_start":
            raise RuntimeError("no luck")

    def sums(self):
        return {"total": self.total}

    def compute(self, sums):
        return {"counter/total": sums["total"].sum()}

    def reset(self):
        self.total = torch.zeros_like(self.total)

    def on_log(self, record):
        self.logs.append(record)

    def state_dict(self):
        return {"total": self.total, "bad": object()} if self.fail == "state" else {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


def test_sums_are_merged_logged_and_reset():
    hook = Counter()
    hooks = HookList([hook])
    hooks.dispatch("on_start", RUN)
    assert hooks.reduce_and_log(1, 2) == {"counter/total": 2.0}
    assert hook.logs == [LogRecord(1, 2, {"counter/total": 2.0})]
    assert hooks.reduce_and_log(2, 2) == {"counter/total": 0.0}


def test_unknown_events_and_wrong_records_are_errors():
    hooks = HookList([Counter()])
    with pytest.raises(UserError, match="did you mean on_start"):
        hooks.dispatch("on_strat", RUN)
    with pytest.raises(UserError, match="takes a RunRecord"):
        hooks.dispatch("on_start", EndRecord(1, None, {}))
    assert all(hasattr(Hook, event) for event in EVENTS)


def test_a_method_that_would_never_be_called_is_an_error():
    class Typo(Hook):
        name = "typo"

        def on_microbatch(self, record):
            pass

    with pytest.raises(UserError, match="did you mean on_micro_batch"):
        HookList([Typo()])


def test_names_must_be_distinct():
    with pytest.raises(UserError, match="distinct"):
        HookList([Counter(), Counter()])


@pytest.mark.parametrize("fail", ["on_start", "state"])
def test_a_failing_hook_is_reported_once_and_disabled(caplog, fail):
    bad, good = Counter(), Counter()
    bad.fail, good.name = fail, "good"
    hooks = HookList([bad, good])
    with caplog.at_level(logging.WARNING):
        hooks.dispatch("on_start", RUN)
        hooks.state_dict()
        hooks.state_dict()
        hooks.dispatch("on_start", RUN)
    reports = [r for r in caplog.records if "hook counter failed" in r.message]
    assert len(reports) == 1
    assert "Traceback" in reports[0].message
    assert hooks.disabled == {"counter"}
    assert good.total.sum() == 4  # training and the other hooks go on


def test_state_goes_round(caplog):
    first = HookList([Counter()])
    first.dispatch("on_start", RUN)
    second = HookList([Counter()])
    second.load_state_dict(first.state_dict())
    assert second.reduce_and_log(1, 2) == {"counter/total": 2.0}
    HookList([Counter()]).load_state_dict({})
    assert "starts afresh" in caplog.text


def test_a_changed_layout_disables_the_hook_not_the_run():
    hook = Counter()
    hooks = HookList([hook])
    hook.total = torch.ones(3)
    assert hooks.reduce_and_log(1, 2) == {"counter/total": 0.0}
    assert hooks.disabled == {"counter"}


def test_sums_of_ranks_that_are_no_more_are_in_the_next_log_and_in_checkpoints_before_it():
    states = []
    for total in (1.0, 10.0, 100.0):
        hook = Counter()
        hook.total += total
        states.append(HookList([hook]).state_dict())
    hooks = HookList([Counter()])
    hooks.load_state_dict(states[0], states[1:])
    again = HookList([Counter()])  # stopped once more before it has logged
    again.load_state_dict(hooks.state_dict())
    for one in (hooks, again):
        assert one.reduce_and_log(1, 2) == {"counter/total": 222.0}
        assert one.reduce_and_log(2, 2) == {"counter/total": 0.0}
    new = HookList([Counter()])
    new.load_state_dict(hooks.state_dict() | states[0], begins=True)
    assert new.reduce_and_log(1, 2) == {"counter/total": 0.0}

"""What an objective needs of a run stands beside its config, and nowhere else is its name or class asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibtrain.config import RunConfig
from calibtrain.loss_list import sections

ROOT = Path(__file__).parents[2]
# (data, module, reference) of each objective with its defaults
NEEDS = {
    "sft": ("records", "plain", "none"),
    "orpo": ("pairs", "plain", "none"),
    "dpo": ("pairs", "plain", "log-probs"),
    "ipo": ("pairs", "plain", "log-probs"),
    "simpo": ("pairs", "plain", "none"),
    "kto": ("unpaired", "plain", "log-probs"),
    "focal": ("records", "plain", "none"),
    "label_smoothing": ("records", "plain", "none"),
    "idk": ("records", "plain", "none"),
    "refusal": ("relabelled", "plain", "none"),
    "custom": ("records", "plain", "none"),
    "reward_model": ("pairs", "reward head", "none"),
    "grpo": ("rollouts", "plain", "none"),
    "rloo": ("rollouts", "plain", "none"),
    "ppo": ("rollouts", "value head", "none"),
}
REQUIRED = {"label_smoothing": {"tokens": ["A"]}, "custom": {"loss": "mine:Loss"}}


def config(name, **keys):
    return RunConfig.model_validate({"objective": {"name": name, **REQUIRED.get(name, {}), **keys}})


def test_every_objective_says_what_it_needs():
    names = {name for kind, name in sections() if kind == "objective"}
    found = {name: config(name).objective.needs for name in names}
    assert {name: (one.data, one.module, one.reference) for name, one in found.items()} == NEEDS


def test_needs_that_depend_on_keys():
    assert config("custom", data="pairs").trains_on_pairs
    for name in ("grpo", "rloo", "ppo"):
        needs = config(name, beta=0.1).objective.needs
        assert (needs.reference, needs.module) == ("live", NEEDS[name][1])
    assert config("reward_model", confidence_statements="alone").objective.needs.statements == "alone"
    assert config("ppo", value_model="own").objective.needs.module == "value model"


def test_what_a_reward_is_compared_with_and_where_the_kl_stands():
    found = {name: config(name).objective.needs for name in ("sft", "grpo", "rloo", "ppo")}
    assert {name: (one.credit, one.kl_in_reward, one.whole_answers) for name, one in found.items()} == {
        "sft": ("none", False, False),
        "grpo": ("group", False, False),
        "rloo": ("others", True, True),
        "ppo": ("values", True, False),
    }


def test_prompts_are_shared_where_several_answers_follow_them():
    shared = {name for name in NEEDS if config(name).shares_prompts}
    assert shared == {"orpo", "dpo", "ipo", "simpo", "grpo", "rloo", "ppo"}  # a reward reads the last token itself
    assert config("custom", data="pairs").shares_prompts


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_is_asked_for_by_objectives_and_penalties_alike(name):
    assert config(name).needs_reference_logprobs
    assert not config("simpo").needs_reference_logprobs
    anchor = {"objective": {"name": "simpo"}, "penalties": [{"name": "divergence_anchor"}]}
    assert RunConfig.model_validate(anchor).needs_reference_logprobs


def test_nothing_asks_for_the_name_of_an_objective():
    asks = re.compile(r"objective\.name\s*(?:==|!=|in\b|not in\b)|isinstance\((?:self\.|config\.)*objective\b")
    places = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("calibtrain", "losses", "launchers")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if asks.search(line)
    ]
    assert places == []


@pytest.mark.parametrize(("name", "problem"), [("refusal", "labels its anew"), ("reward_model", "leave out penalties")])
def test_what_does_not_fit_is_told_by_need(name, problem):
    with pytest.raises(ValueError, match=problem):
        RunConfig.model_validate({"objective": {"name": name}, "penalties": [{"name": "divergence_anchor"}]})

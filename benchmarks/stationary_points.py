"""Where training ends: the exact expected gradient of a config's reward, advantage and losses, followed until it is zero.

    python benchmarks/stationary_points.py --json benchmarks/results/stationary_points.json

The policy gives one of a few answers to one question, and which of them is right is drawn anew each time, so that the
truth is a distribution. Every group of samples that the policy may draw is enumerated with its probability. Credit,
objective and penalties are the package's own, built from the config.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _report import print_table, write_json
from _stationary_toy import End, Policy, Question, Toy, stats_of
from torch import Tensor, nn

from calibtrain.config import RunConfig
from calibtrain.losses import build_loss
from calibtrain.losses.answer_score import answer_brier_score, answer_log_score
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import Batch
from calibtrain.models.confidence_head import ConfidenceHead, score_of
from calibtrain.training.reward_memory import Memory
from calibtrain.training.rollout_credit import Credit, credit
from calibtrain.training.samples import Sample

BEFORE = Memory(threshold=0.0)
"""PPO-C's threshold, where half of all other questions are right: it hardly moves by this one."""


def find_end(config: RunConfig, toy: Toy, *, steps: int = 500, rate: float = 0.1) -> End:
    """Ascend the exact expected gradient with Adam, its rate falling to 0."""
    policy = Policy(toy)
    valued, rollouts = config.objective.needs.credit == "values", config.rollouts
    question = Question(config, toy, policy, 1 if valued else toy.group)
    answers = Question(config, toy, policy, 1)  # what the score in the loss is a sum over
    critic = Critic(toy) if config.objective.needs.module == "value model" else None
    objective = build_loss(config.objective)
    head = None if config.confidence_head is None else Told(config, answers, len(toy.truth))
    penalties = [build_loss(one) for one in config.penalties_in_loss]
    if rollouts.rewards_nothing:
        watch_of(objective).leave("advantages")
    learnt = [*policy.parameters(), *([] if critic is None else [critic.values])]
    learnt += [] if head is None else list(head.module.parameters())
    optimizer = torch.optim.Adam(learnt, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    fixed = None if valued else credit_of(config, question)
    for step in range(steps):
        logprobs = policy.logprobs()
        if step % rollouts.steps_on_a_round == 0:
            old = logprobs.detach()
            advantages = fixed if fixed is not None else ppo_credit(config, question, policy, critic)
        weights = question.weights(old)
        flat = question.groups.flatten()
        batch = replace(
            question.batch,
            advantages=advantages * weights[question.owner].repeat_interleave(old.shape[1]),
            old_logprob=old[flat].flatten(),
        )
        if valued:  # its values are taken to be right, but for those of a model of their own
            batch = replace(batch, scores=batch.advantages, old_values=batch.advantages, returns=batch.advantages)
        per_answer = (
            old.shape[1]
            if getattr(objective, "norm", "token") == "token" and not config.objective.needs.whole_answers
            else 1
        )
        terms = objective(stats_of(logprobs[flat].flatten()), batch)
        loss = terms["policy"].total / (question.size * per_answer)
        if critic is not None:
            loss = loss + critic.loss(objective, batch, weights[question.owner].repeat_interleave(old.shape[1]))
        for penalty in penalties:
            loss = loss + expected(penalty, answers, logprobs, old)
        if head is not None:
            loss = loss + head.loss(logprobs, old)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = policy.end()
    return found if head is None else replace(found, told=head.told(policy.logprobs().detach()))


class Told:
    """A confidence head that sees which answer was given: its hidden state is the answer, as a direction of its own."""

    def __init__(self, config: RunConfig, answers: Question, size: int) -> None:
        section = config.confidence_head
        assert section is not None
        self.score, self.weight = config.head_score
        self.module = ConfidenceHead((0,), size, trains_backbone=section.trains_backbone).double()
        self.answers = answers
        self.states = torch.eye(size, dtype=torch.float64)[answers.batch.targets][:, None]

    def logits(self, logprobs: Tensor) -> Tensor:
        """Log-odds of each case's answer being right."""
        flat = logprobs[self.answers.groups[:, 0]].flatten()
        if not self.module.trains_backbone:
            flat = flat.detach()
        return self.module(stats_of(flat), self.states, self.answers.batch)

    def loss(self, logprobs: Tensor, old: Tensor) -> Tensor:
        """The mean score over the answers that the policy of log-probs `old` samples."""
        correct = self.answers.batch.correct.double()
        graded = ~correct.isnan()
        scores = score_of(self.logits(logprobs), torch.where(graded, correct, 0.0), self.score)
        return self.weight * (self.answers.weights(old) * torch.where(graded, scores, 0.0)).sum()

    @torch.no_grad()
    def told(self, logprobs: Tensor) -> tuple[float, ...]:
        """What it tells of each answer."""
        told = self.logits(logprobs).sigmoid()
        given = self.answers.groups[:, 0]
        return tuple(float(told[given == answer][0]) for answer in range(len(logprobs)))


class Critic:
    """Values that are learnt beside the policy, by the objective's own loss: of the question, and of what was answered."""

    def __init__(self, toy: Toy) -> None:
        self.values = torch.zeros(1 + len(toy.truth), dtype=torch.float64).requires_grad_()

    def sampled(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the present values of their states; kept for their loss, with the returns that they lead to."""
        states = [[0, 1 + one.tokens[0]][: len(one.tokens)] for one in samples]
        self.states = torch.tensor([state for row in states for state in row])
        self.old = self.values.detach()[self.states]
        found = self.values.detach().tolist()
        return [replace(one, values=tuple(found[i] for i in row)) for one, row in zip(samples, states, strict=True)]

    def loss(self, objective: nn.Module, batch: Batch, weights: Tensor) -> Tensor:
        """What has the gradient of the value loss's mean over what is sampled."""
        scores = self.values[self.states]
        leaf = scores.detach().requires_grad_()
        terms = objective(
            stats_of(torch.zeros_like(leaf)), replace(batch, scores=leaf, old_values=self.old, returns=self.returns)
        )
        (each,) = torch.autograd.grad(terms["value"].total, leaf)
        return (weights * each * scores).sum()


def expected(penalty: nn.Module, answers: Question, logprobs: Tensor, old: Tensor) -> Tensor:
    """What has the gradient of a penalty's mean over the answers that the policy of log-probs `old` samples.

    The term is a sum over answers, each a function of its own log-prob: that sum's gradient holds one for each.
    """
    flat = logprobs[answers.groups[:, 0]].flatten()
    leaf = flat.detach().requires_grad_()
    (term,) = penalty(stats_of(leaf), answers.batch).values()
    (each,) = torch.autograd.grad(term.weight * term.total, leaf)
    return (answers.weights(old).repeat_interleave(old.shape[1]) * each * flat).sum()


def credit_of(config: RunConfig, question: Question) -> Tensor:
    """Advantage of every token of every case. (N,) float64."""
    return flat_credit(credit(question.samples, question.owner.tolist(), config, BEFORE)[0])


def flat_credit(found: Sequence[Credit]) -> Tensor:
    """Advantages of all tokens, 0 of those that are no part of a batch. (N,) float64."""
    return torch.tensor([value * one.learned for one in found for value in one.advantages], dtype=torch.float64)


def ppo_credit(config: RunConfig, question: Question, policy: Policy, critic: Critic | None) -> Tensor:
    """Advantages with the value of each state as it is under the policy: of the question, and of what was answered.

    They are divided by the spread over all cases alike, not by that over what is sampled: a positive factor.
    """
    if critic is not None:
        found, _ = credit(critic.sampled(question.samples), question.owner.tolist(), config)
        critic.returns = torch.tensor([value for one in found for value in one.returns], dtype=torch.float64)
        return flat_credit(found)
    logprobs = policy.logprobs().detach()
    weights = question.weights(logprobs)
    zero = [replace(one, values=(0.0,) * len(one.tokens)) for one in question.samples]
    plain = config.model_copy(update={"objective": config.objective.model_copy(update={"lam": 1.0, "gamma": 1.0})})
    returns = torch.tensor(
        [one.returns[0] for one in credit(zero, question.owner.tolist(), plain, BEFORE)[0]], dtype=torch.float64
    )
    start = (weights * returns).sum()
    by_answer: dict[int, float] = {}
    for answer in {one.tokens[0] for one in question.samples}:
        mask = torch.tensor([one.tokens[0] == answer for one in question.samples])
        by_answer[answer] = float((weights * returns)[mask].sum() / weights[mask].sum())
    given = [
        replace(one, values=(float(start), by_answer[one.tokens[0]])[: len(one.tokens)]) for one in question.samples
    ]
    return flat_credit(credit(given, question.owner.tolist(), config, BEFORE)[0])


def score_end(truth: Sequence[float], score: str, how: str, *, steps: int = 1000, rate: float = 0.1) -> End:
    """Where the mean score of the likelihoods ends by itself.

    `how`: "loss" differentiates the likelihood, as answer_score does; "whole" also what is sampled, so that answers are
    credited with their scores; "reward" that alone, so that the likelihood is a constant, with 1 for being right beside it.
    """
    t = torch.tensor(truth, dtype=torch.float64)
    logits = torch.zeros_like(t).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    loss_of = {"brier": answer_brier_score, "log": answer_log_score}[score]
    for _ in range(steps):
        logprob = logits.log_softmax(0)
        q = logprob.detach() if how == "reward" else logprob
        mean = t * loss_of(q, torch.ones_like(t)) + (1.0 - t) * loss_of(q, torch.zeros_like(t))
        share = logprob.exp().detach() if how == "loss" else logprob.exp()
        loss = (share * (mean - (t if how == "reward" else 0.0))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return End(tuple(logits.detach().softmax(0).tolist()))


def run_config(objective: Mapping[str, Any] | str, rollouts: Mapping[str, Any], **more: Any) -> RunConfig:
    """A run of this objective, by name or with its keys, and these rollouts."""
    name = {"name": objective} if isinstance(objective, str) else dict(objective)
    return RunConfig.model_validate({"objective": name, "rollouts": dict(rollouts), **more})


TWO, THREE, NEVER = (0.6, 0.4), (0.5, 0.3, 0.2), (0.5, 0.3, 0.0, 0.0, 0.0, 0.0)


def rows() -> list[dict[str, Any]]:
    """The table of docs/rewards.md."""
    found = []

    def add(what: str, truth: Sequence[float], end: End) -> None:
        ends = " ".join(f"{one:.2f}" for one in end.answers)
        if end.told:
            ends += "; tells " + " ".join(f"{one:.2f}" for one in end.told)
        stated = f"{end.stated[0]:.2f}" if end.stated else ""
        found.append({"what": what, "truth": " ".join(f"{one:g}" for one in truth), "ends": ends, "stated": stated})

    rloo = {"group_size": 2}
    for truth in (TWO, THREE, NEVER):
        add("reward: accuracy", truth, find_end(run_config("rloo", {**rloo, "reward": "accuracy"}), Toy(truth)))
        for score in ("brier", "log"):
            for weight in (None, 1.0):
                rollouts = {**rloo, "reward": score, "accuracy_weight": weight}
                name = f"reward: {score}" + ("" if weight is None else f", accuracy_weight: {weight:g}")
                add(name, truth, find_end(run_config("rloo", rollouts), Toy(truth), steps=800))
            add(f"{score}, whole gradient", truth, score_end(truth, score, "whole"))
        add("1 if right and brier, as a reward", truth, score_end(truth, "brier", "reward"))
    stated = {**rloo, "confidence": "stated", "decoupled": False}
    for reward, weight in (("brier", 1.0), ("log", 7.0)):
        rollouts = {**stated, "reward": reward, "accuracy_weight": weight}
        add(f"reward: {reward}, confidence: stated", TWO, find_end(run_config("rloo", rollouts), Toy(TWO, stated=True)))
    ranked = run_config({"name": "grpo", "scale_advantages": "group"}, stated)
    add("the same with scale_advantages: group", TWO, find_end(ranked, Toy(TWO, stated=True)))
    for form in ("threshold", "difference", "proper"):
        rollouts = {**stated, **MODEL, "reward": "ppo_c", "ppo_c": {"form": form}}
        toy = Toy(TWO, stated=True, scores=knowing)
        add(f"reward: ppo_c, form: {form}", TWO, find_end(run_config("rloo", rollouts), toy))
    for what, scores in (
        ("reward: model", knowing),
        ("reward: model that likes high confidence, confidence: stated", liking),
        ("reward: model that PPO-M trained, confidence: stated", after_ppo_m),
    ):
        said = "stated" in what
        config = run_config("rloo", {**rloo, **MODEL, "confidence": "stated" if said else "likelihood"})
        add(what, TWO, find_end(config, Toy(TWO, stated=said, scores=scores)))
    config = run_config("rloo", {**rloo, **MODEL, "reward": "log", "accuracy_weight": 0.5})
    add("reward: log and a model, accuracy_weight: 0.5", TWO, find_end(config, Toy(TWO, scores=knowing)))
    config = run_config("grpo", {**rloo, **MODEL, "reward": "brier", "confidence": "stated"})
    add("reward: brier and a model, confidence: stated", TWO, find_end(config, Toy(TWO, stated=True, scores=knowing)))
    for weight in (0.1, 1.0):
        config = run_config("rloo", {**rloo, "sources": [{"kind": "grade"}, {**MODEL["sources"][0], "weight": weight}]})
        found_end = find_end(config, Toy(TWO, scores=preferring_second))
        add(f"sources: grade and {weight:g} times a model that likes the other", TWO, found_end)
    for truth in (TWO, THREE):
        for reward in ("brier", "log"):
            config = run_config("rloo", {**rloo, "reward": reward, "confidence": "head"}, confidence_head={})
            add(f"reward: {reward}, confidence: head", truth, find_end(config, Toy(truth), steps=1500))
    for risk in (0.3, 0.5):
        config = run_config("rloo", {**rloo, "reward": "ternary"}, abstention={"target_risk": risk})
        add(f"reward: ternary, target_risk: {risk:g}", (*TWO, 0.0), find_end(config, Toy((*TWO, 0.0), abstains=True)))
    return found


MODEL: dict[str, Any] = {"sources": [{"kind": "model", "path": "a-toy", "normalize": False}]}


def knowing(answer: int, right: bool, stated: float) -> Sequence[float]:
    """A reward model that gives 1 to a right answer and -1 to a wrong one, whatever it states."""
    return (1.0 if right else -1.0,)


def liking(answer: int, right: bool, stated: float) -> Sequence[float]:
    """The same, but half a unit more for stating 1 than for stating 0."""
    return (knowing(answer, right, stated)[0] + 0.5 * stated,)


def after_ppo_m(answer: int, right: bool, stated: float) -> Sequence[float]:
    """PPO-M's, where the answer is the better one of its pairs .6 of the time: high beats low by log(.6 / .4)."""
    return (math.log(TWO[answer] / (1.0 - TWO[answer])) * stated,)


def preferring_second(answer: int, right: bool, stated: float) -> Sequence[float]:
    """A reward model that likes the second answer, right or wrong."""
    return (float(answer == 1),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = rows()
    print_table("Where training ends", found)
    if arguments.json:
        summary = {f"{one['what']} ({one['truth']})": one["stated"] or one["ends"] for one in found}
        write_json(arguments.json, found, summary)


if __name__ == "__main__":
    main()

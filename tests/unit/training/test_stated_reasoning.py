"""A confidence stated behind a reasoning: sampled, read, graded and credited; each word learns what it can be blamed for."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import AddedToken

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.templates import template_of
from calibtrain.distributed import World
from calibtrain.losses import build_loss
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.rollouts import Rollouts
from tests.tiny import tiny_model, tiny_tokenizer

SEVEN, NINE = ("\nConfidence:", "\n**Confidence:**")
NEXT = {
    "<think>": {" 3 + 4, or 3 * 3": 0.0},
    " 3 + 4, or 3 * 3": {"</think>": 0.0},
    "</think>": {"The answer is": 0.0},
    "The answer is": {" 7.": 0.0, " 9.": 0.0},
    " 7.": {SEVEN: 1.0, "<|im_end|>": 0.0},
    " 9.": {NINE: 1.0, "<|im_end|>": 0.0},
    SEVEN: {" 20%": 0.0, " 60%": 0.0, " 100%": 0.0},
    NINE: {" 20%": 0.0, " 60%": 0.0, " 100%": 0.0},
    " 20%": {"<|im_end|>": 0.0},
    " 60%": {"<|im_end|>": 0.0},
    " 100%": {"<|im_end|>": 0.0},
}
"""Which words may follow a word, and their logits at the start."""
QUESTIONS = [
    Record(prompt=(Message("user", f"{i}?"),), accepted=("7" if i < 3 else "9",), origin=f"r{i}") for i in range(5)
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rollouts_of(**sections):
    """A policy that looks at the last word alone: embeddings are one-hot, and layers pass them on."""
    run = RunConfig.model_validate(
        {
            "model": {"dtype": "fp32"},
            "data": {"max_length": 64, "template": "chat"},
            "task": {"kind": "number"},
            "objective": {"name": "grpo"},
            "rollouts": {"confidence": "stated", "group_size": 8},
            "evaluation": {"max_new_tokens": 12},
            "training": {"micro_batch_size": 5, "global_batch_size": 5},
            **sections,
        }
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in NEXT])
    template = template_of(run, tokenizer)
    size = len(tokenizer)
    model = tiny_model(size, tied=False, hidden=416, layers=1, intermediate_size=8)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (*NEXT, "<|im_end|>")}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, 416))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        table = torch.full((size, 416), -30.0)
        table[ids["<think>"], template.prompt_ids(QUESTIONS[0])[-1]] = 0.0
        for word, followers in NEXT.items():
            for follower, logit in followers.items():
                table[ids[follower], ids[word]] = logit
        model.lm_head.weight.copy_(table / 416**0.5)
    module = LossModel(Policy(model.requires_grad_(False)), build_loss(run.objective))
    model.lm_head.weight.requires_grad_(True)
    answerer = Answerer(module, template, run.evaluation, World(0, 1, 0, torch.device("cpu")))
    return Rollouts(run, answerer, QUESTIONS, BatchPlan(5, 1, 1)), module, ids


def test_a_statement_behind_a_reasoning_is_read_and_stands_where_it_was_said():
    rollouts, _, _ = rollouts_of()
    rollouts.before_step(0)
    tokenizer = rollouts.answerer.template.tokenizer
    seen = set()
    for one in rollouts.samples:
        words = [tokenizer.decode([token]) for token in one.tokens]
        begin = next((i for i, word in enumerate(words) if word in (SEVEN, NINE)), None)
        answer = 4
        assert words[:answer] == ["<think>", " 3 + 4, or 3 * 3", "</think>", "The answer is"]
        assert one.correct == float(words[answer].strip(" .") == QUESTIONS[one.question].accepted[0])
        assert (one.answer_start, one.answer_stop) == (answer, answer + 1)  # not the number of the statement
        assert one.finished
        if begin is None:
            assert math.isnan(one.confidence)
            assert one.stated == (False,) * (len(words) - 1) + (True,)
        else:
            assert one.confidence == int(words[begin + 1].strip(" %")) / 100
            assert one.stated == tuple(i >= begin for i in range(len(words)))
        seen.add((one.confidence if begin else None, one.correct))
    assert len(seen) >= 6
    credits = dict(zip(range(len(rollouts.samples)), rollouts._credit, strict=True))
    size = rollouts.config.rollouts.group_size
    for start in range(0, len(rollouts.samples), size):
        group = range(start, start + size)
        grades = [rollouts.samples[i].correct for i in group]
        for i in group:
            expected = rollouts.samples[i].correct - sum(grades) / len(grades)
            reasoning = [
                a for a, said in zip(credits[i].advantages, rollouts.samples[i].stated, strict=True) if not said
            ]
            assert reasoning == pytest.approx([expected] * len(reasoning))


def test_a_reply_that_is_cut_states_nothing():
    rollouts, _, _ = rollouts_of(evaluation={"max_new_tokens": 7})  # up to the number, and not its end
    rollouts.before_step(0)
    cut = [one for one in rollouts.samples if not one.finished]
    assert len(cut) > 10
    assert all(math.isnan(one.confidence) for one in cut)
    assert {one.correct for one in cut} == {0.0, 1.0}


def test_it_learns_the_answer_and_its_chance():
    """7 is right in three of five questions, which the policy cannot tell apart: it says 7, and 60%."""
    rollouts, module, ids = rollouts_of()
    weight = module.policy.causal_model.lm_head.weight
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for step in range(60):
        rollouts.before_step(step)
        batch = rollouts.fill(
            collate([one for i in range(5) for one in rollouts[i]], rollouts.answerer.template.pad_id), range(5)
        )
        loss, _ = module(TrainStep(batch, {name: count.float() for name, count in module.counts(batch).items()}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = weight.detach() * 416**0.5

    def chance(word, after):
        return float(logits[:, ids[after]].softmax(0)[ids[word]])

    assert chance(" 7.", "The answer is") > 0.8
    assert chance(SEVEN, " 7.") > 0.9  # it states one
    assert chance(" 60%", SEVEN) > 0.7
    assert rollouts.metrics["confidence_missing"] < 0.2

"""The loss on held-out records: that of each record alone, however they are batched and dealt out."""

from __future__ import annotations

import pytest
import torch

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.losses.terms import CHOSEN
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.models.reward import RewardLossModel
from calibtrain.records import Message, Record
from calibtrain.training.held_out import HeldOut, encode_held_out
from calibtrain.training.losses import build_losses, term_names
from tests.tiny import tiny_model, tiny_tokenizer

RECORDS = [
    Record((Message("user", f"What is {i}{' and more' * (i % 4)}?"),), chosen=f"{i}", rejected=f"not {i}")
    for i in range(7)
]


def held_out(objective, records=RECORDS, rank=0, ranks=1, micro=2, packing=None, **sections):
    config = RunConfig.model_validate(
        {
            "objective": objective,
            "training": {"micro_batch_size": micro, "global_batch_size": 12},
            "data": {"max_length": 64, "splits": {"validation": 7}},
            **sections,
        }
    )
    template, policy = Template("plain", tiny_tokenizer()), Policy(tiny_model(attention_dropout=0.5))
    module = LossModel(policy, *build_losses(config, template, policy.causal_model))
    examples = encode_held_out(records, config, template)
    world = World(rank, ranks, rank, torch.device("cpu"))
    return HeldOut(config, examples, template.pad_id, world, packing), module.train()


def alone(measured, module):
    """Sum and number of the chosen answers' tokens, one sequence at a time."""
    module.eval()
    total, count = 0.0, 0
    for group in measured.examples:
        [one] = [sequence for sequence in group if sequence.role == CHOSEN]
        batch = collate([one], 0)
        logits = module.policy.causal_model(input_ids=torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
        place = torch.arange(one.completion_start, len(one.ids))
        total -= float(logits[place - 1, torch.tensor(one.ids)[place]].sum().detach())
        count += int(batch.is_completion.sum())
    return total / count


@pytest.mark.parametrize("objective", [{"name": "sft"}, {"name": "orpo"}, {"name": "kto"}, {"name": "grpo"}])
@pytest.mark.parametrize(("micro", "packing"), [(1, None), (3, None), (3, 96)])
def test_it_is_the_mean_over_tokens_whatever_the_batches(objective, micro, packing):
    measured, module = held_out(objective, micro=micro, packing=packing)
    found = measured.measure(module)
    assert module.training
    assert found["eval/loss"] == pytest.approx(alone(measured, module), rel=1e-5)
    assert all(key.startswith("eval/loss") for key in found)
    terms = {key.removeprefix("eval/loss/") for key in found} - {"eval/loss"}
    assert bool(terms) == (objective["name"] in ("sft", "orpo"))
    if "eval/loss/nll" in found and objective["name"] == "sft":
        assert found["eval/loss/nll"] == pytest.approx(found["eval/loss"], rel=1e-5)


def test_ranks_have_as_many_batches_and_all_examples_between_them():
    for ranks in (1, 2, 3, 5):
        shares = [held_out({"name": "sft"}, rank=rank, ranks=ranks)[0]._mine() for rank in range(ranks)]
        assert len({len(one) for one in shares}) == 1
        dealt = [group[0].record_id for share in shares for batch in share for group in batch]
        assert sorted(dealt) == list(range(7))


def test_an_empty_batch_adds_nothing():
    measured, module = held_out({"name": "orpo"}, micro=4)
    whole = measured.measure(module)
    object.__setattr__(measured, "_mine", lambda mine=measured._mine: [*mine(), []])
    assert measured.measure(module) == pytest.approx(whole, rel=1e-12)


def test_a_reward_model_has_terms_and_no_nll():
    measured, module = held_out({"name": "reward_model"}, micro=3)
    reward = RewardLossModel(module.policy, module.objective).train()
    whole = measured.measure(reward)
    assert set(whole) == {f"eval/loss/{name}" for name in term_names(measured.config)}
    assert "eval/loss" not in whole
    other, _ = held_out({"name": "reward_model"}, micro=1)
    assert other.measure(reward) == pytest.approx(whole, rel=1e-5)


def test_pairs_that_are_still_to_be_found_leave_the_nll():
    records = [Record(one.prompt, chosen=one.chosen) for one in RECORDS]
    measured, module = held_out({"name": "orpo"}, records=records)
    assert set(measured.measure(module)) == {"eval/loss"}

"""Reference log-probs are those of the model as it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.turns import IGNORED
from calibtrain.distributed import World
from calibtrain.losses.calibration_tuning import DivergenceAnchor
from calibtrain.losses.terms import ANSWER, CHOSEN, mean_loss
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline import examples
from calibtrain.training.reference import with_reference_logprobs
from tests.tiny import tiny_model

SEQUENCES = [
    Encoded((5, 9, 30, 31, 1), 2, ANSWER, 0, correct=1.0),
    Encoded((7, 8, 9, 10, 44, 1), 4, CHOSEN, 1),
    Encoded((6, 1), 1, ANSWER, 2, correct=0.0),
]
CONVERSATION = Encoded((7, 8, 9, 10, 44, 1), 2, CHOSEN, 1, labels=(9, IGNORED, IGNORED, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_reference_logprobs_are_the_models_own(batch_size):
    model = tiny_model(attention_dropout=0.5)
    policy = Policy(model).train()
    found = with_reference_logprobs(policy, SEQUENCES, 2, batch_size=batch_size)
    assert policy.training
    for before, after in zip(SEQUENCES, found, strict=True):
        assert (after.ids, after.role, after.record_id) == (before.ids, before.role, before.record_id)
        ids = torch.tensor([before.ids])
        with torch.no_grad():
            table = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = table[before.completion_start - 1 :]
        torch.testing.assert_close(torch.tensor(after.reference_logprobs), expected, rtol=1e-5, atol=1e-5)
        model.train()


def test_reference_logprobs_of_a_conversation_are_those_of_its_labels():
    policy = Policy(tiny_model())
    [found, other] = with_reference_logprobs(policy, [CONVERSATION, SEQUENCES[0]], 2)
    with torch.no_grad():
        table = policy.causal_model(input_ids=torch.tensor([found.ids])).logits[0].log_softmax(-1)
    expected = torch.stack([table[1, 9], table[4, 3]])
    torch.testing.assert_close(torch.tensor(found.reference_logprobs), expected, rtol=1e-5, atol=1e-5)
    for scope, place in (("completion", [0, 1]), ("full", [1, 4])):
        values = collate([found, other], 2, scope).reference_logprob
        torch.testing.assert_close(values[place], expected, rtol=1e-5, atol=1e-5)
        assert int((~values.isnan()).sum()) == 2 + len(other.reference_logprobs)


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_knows_them_of_all_examples(ranks, monkeypatch):
    """Each measures its share; what passes between the ranks is numbers, not sequences. Three ranks as threads."""
    model = LossModel(Policy(tiny_model())).eval()
    groups = [tuple(SEQUENCES[:2]), (CONVERSATION,), tuple(SEQUENCES[2:]), (SEQUENCES[0],)]
    expected = [tuple(with_reference_logprobs(model.policy, group, 2)) for group in groups]
    config = RunConfig.model_validate({"objective": {"name": "dpo"}})
    meeting, sent, who = Barrier(ranks), [None] * ranks, local()

    def gather(values):
        assert not any(isinstance(one, tuple | Encoded) for one in values)
        sent[who.rank] = values
        meeting.wait(20)
        found = [one for part in sent for one in part]
        meeting.wait(20)
        return found

    def on(rank):
        who.rank = rank
        world = World(rank, ranks, 0, torch.device("cpu"))
        return list(examples.with_reference(config, groups, SimpleNamespace(pad_id=2), model, world))

    monkeypatch.setattr(examples, "gather_lists", gather)
    with ThreadPoolExecutor(ranks) as pool:
        for found in pool.map(on, range(ranks)):
            for group, wanted in zip(found, expected, strict=True):
                assert [one.ids for one in group] == [one.ids for one in wanted]
                for one, same in zip(group, wanted, strict=True):
                    assert one.reference_logprobs == pytest.approx(same.reference_logprobs, abs=1e-6)


def test_the_anchor_is_zero_at_the_reference_and_pulls_back_to_it():
    policy = Policy(tiny_model(tied=False)).eval()
    head = policy.causal_model.lm_head.weight
    with torch.no_grad():
        head.mul_(20.0)  # a model that is sure of something
    batch = collate(with_reference_logprobs(policy, SEQUENCES, 2), 2)
    loss = DivergenceAnchor()

    def value():
        return mean_loss(loss(policy.token_stats(policy.hidden_at_targets(batch), batch.targets), batch))

    assert abs(value().item()) < 1e-6
    with torch.no_grad():
        head[batch.targets.unique()] *= -0.5
    moved = value().item()
    assert moved > 1e-3
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert value().item() < 0.2 * moved

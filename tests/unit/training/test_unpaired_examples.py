"""The reference point of a step: that of all its mismatched answers, however they are cut into micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.data.loader import step_indices
from calibtrain.distributed import World
from calibtrain.losses.terms import CHOSEN, REJECTED
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.training.deepspeed_config import BatchPlan
from calibtrain.training.reference import with_reference_logprobs
from calibtrain.training.unpaired_examples import UnpairedExamples
from tests.tiny import tiny_model

COUNT, STEP = 10, 8


def sequences():
    for i in range(COUNT):
        ids = tuple(5 + (7 * i + j * j) % 300 for j in range(4 + i % 5))
        yield Encoded((*ids, 1), 2, CHOSEN if i % 2 else REJECTED, i)


@pytest.fixture(scope="module")
def examples():
    """Labelled and mismatched answers with the log-probs of another model."""
    labelled = with_reference_logprobs(Policy(tiny_model(seed=1)), list(sequences()), 2)
    other = [Encoded(one.ids[::-1], 3, REJECTED, one.record_id) for one in labelled]
    return list(zip(labelled, with_reference_logprobs(Policy(tiny_model(seed=1)), other, 2), strict=True))


def unpaired(examples, micro_batch_size, model):
    answerer = SimpleNamespace(
        module=LossModel(Policy(model)), template=SimpleNamespace(pad_id=2), world=World(0, 1, 0, torch.device("cpu"))
    )
    plan = BatchPlan(micro_batch_size, STEP // micro_batch_size, 1)
    return UnpairedExamples(examples, answerer, plan, seed=3)


def test_reference_point_is_that_of_the_whole_step(examples):
    model = tiny_model(attention_dropout=0.5)
    found = {}
    for size in (1, 2, 8):
        one = unpaired(examples, size, model)
        one.answerer.module.train()
        assert len(one) == COUNT
        assert one[4] == (examples[4][0],)
        for step in (0, 1, 2):
            one.before_step(step)
            found[size, step] = one.metrics["reference_point"]
            batch = one.fill(collate([examples[0][0]], 2), [0])
            assert float(batch.reference_point) == pytest.approx(found[size, step])
        assert one.answerer.module.training
    for step in (0, 1, 2):
        ratios = []
        for index in step_indices(step, STEP, COUNT, 3):
            sequence = examples[index][1]
            with torch.no_grad():
                table = model.eval()(input_ids=torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)
            logprob = table[range(len(sequence.ids) - 1), sequence.ids[1:]][sequence.completion_start - 1 :]
            ratios.append(float(logprob.sum()) - sum(sequence.reference_logprobs))
        expected = max(0.0, sum(ratios) / STEP)
        assert all(found[size, step] == pytest.approx(expected, abs=1e-5) for size in (1, 2, 8))
    assert len({round(found[1, step], 4) for step in (0, 1, 2)}) > 1


def test_at_the_reference_it_is_zero(examples):
    one = unpaired(examples, 4, tiny_model(seed=1))
    one.before_step(0)
    assert one.metrics["reference_point"] == pytest.approx(0.0, abs=1e-5)
    one.load_state_dict(one.state_dict())

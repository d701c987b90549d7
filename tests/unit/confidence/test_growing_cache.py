"""A cache with room ahead holds what transformers' own holds, and does not copy it with every token."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from calibtrain.confidence import generation, growing_cache
from calibtrain.confidence.generation import generate
from calibtrain.confidence.growing_cache import GrowingLayer, growing
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from tests.tiny import tiny_model


def states(tokens, seed, rows=3):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, 4, generator=made) for _ in range(2)]


def filled():
    layer = DynamicLayer()
    layer.update(*states(5, 0))
    return layer


def test_a_layer_holds_the_same_whatever_is_done_to_its_rows(monkeypatch):
    monkeypatch.setattr(growing_cache, "STEP", 3)
    own, grown, rows = filled(), GrowingLayer(filled()), 3
    for step in range(20):
        if step == 6:
            own.batch_repeat_interleave(2)
            grown.batch_repeat_interleave(2)
            rows = 6
        if step == 11:
            chosen = torch.tensor([5, 0, 2])
            own.batch_select_indices(chosen)
            grown.batch_select_indices(chosen)
            rows = 3
        added = states(1 + step % 2, step + 1, rows)
        for one, other in zip(own.update(*added), grown.update(*added), strict=True):
            assert torch.equal(one, other)
        assert grown.get_seq_length() == own.get_seq_length()
        assert grown.get_mask_sizes(1) == own.get_mask_sizes(1)


def test_it_is_copied_once_in_many_tokens():
    grown, places = GrowingLayer(filled()), set()
    for step in range(2 * growing_cache.STEP):
        places.add(grown.update(*states(1, step))[0].data_ptr())
    assert len(places) <= 3


def test_layers_of_other_kinds_stay():
    cache = DynamicCache()
    cache.layers = [filled(), DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    kinds = [type(one) for one in growing(cache).layers]
    assert kinds == [GrowingLayer, DynamicSlidingWindowLayer, DynamicLayer]
    assert growing(None) is None


@pytest.mark.parametrize("samples", [0, 2])
def test_completions_are_the_same_as_with_transformers_own(monkeypatch, samples):
    model = LossModel(Policy(tiny_model(initializer_range=0.3))).eval()
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 7, 30, 31, 32, 33, 40], [5, 6, 99]]
    given = {"stop_ids": frozenset(range(0, 400, 19)), "pad_id": 2, "max_new_tokens": 40, "batch_size": 4, "seed": 1}
    heard = []

    def goes_on(ids):
        heard.append(tuple(ids))
        return len(ids) < 12

    given.update(samples=samples, goes_on=goes_on)
    monkeypatch.setattr(growing_cache, "STEP", 5)
    monkeypatch.setattr(generation, "STEPS_ON_DEVICE", 4)
    found, asked = generate(model, prompts, **given), heard[:]
    heard.clear()
    monkeypatch.setattr(generation, "growing", lambda cache: cache)
    monkeypatch.setattr(generation, "STEPS_ON_DEVICE", 1000)
    expected = generate(model, prompts, **given)
    assert asked == heard
    assert heard
    assert len({len(one.tokens) for row in found for one in row}) > 1  # rows were dropped on the way
    for one, other in zip([x for row in found for x in row], [x for row in expected for x in row], strict=True):
        assert (one.tokens, one.logprobs, one.finished) == (other.tokens, other.logprobs, other.finished)
        assert torch.equal(one.hidden, other.hidden)
    completions = {one.tokens for row in found for one in row}
    assert all(any(said == tokens[: len(said)] for tokens in completions) for said in asked)

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.config import TrainingConfig
from calibtrain.data.loader import (
    epoch_at,
    epoch_order,
    planned_steps,
    rank_micro_batches,
    step_indices,
    total_steps,
)
from calibtrain.errors import UserError


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))


def test_the_order_is_fixed_for_ever():
    assert tuple(epoch_order(8, 0, 0)) == (5, 3, 7, 2, 1, 0, 4, 6)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3), st.integers(0, 60))
def test_a_step_is_a_slice_of_the_concatenated_epochs(n, size, seed, step):
    stream = [i for epoch in range(1 + (step + 1) * size // n) for i in epoch_order(n, seed, epoch)]
    assert step_indices(step, size, n, seed) == stream[step * size : (step + 1) * size]


def test_steps_do_not_depend_on_what_was_asked_before():
    forward = [step_indices(k, 8, 21, 5) for k in range(20)]
    epoch_order.cache_clear()
    assert [step_indices(k, 8, 21, 5) for k in reversed(range(20))] == forward[::-1]


def test_every_record_is_seen_once_an_epoch():
    seen = Counter(i for k in range(21) for i in step_indices(k, 8, 21, 0))
    assert set(seen.values()) == {8}


@pytest.mark.parametrize(
    ("n", "epochs", "size", "steps"),
    [(400, 4, 8, 200), (400, 0.5, 8, 25), (401, 1, 8, 51), (3, 1, 8, 1), (10, 0.01, 8, 1), (100, 0.29, 1, 29)],
)
def test_total_steps(n, epochs, size, steps):
    assert total_steps(n, epochs, size) == steps


def test_epoch_at():
    assert epoch_at(25, 8, 400) == 0.5
    assert epoch_at(50, 8, 400, passes=2) == 0.5


def test_passes_over_what_was_sampled_are_steps_of_the_same_epoch():
    training = TrainingConfig(epochs=0.5)
    assert planned_steps(training, 400, 8) == 25
    assert planned_steps(training, 400, 8, passes=2) == 50
    assert planned_steps(TrainingConfig(max_steps=7), 400, 8, passes=2) == 7


@st.composite
def steps(draw):
    """Records of one step (a record may be there twice) with their lengths, and how to cut them up."""
    world, accumulation, micro = (draw(st.integers(1, 4)) for _ in range(3))
    count = world * accumulation * micro
    indices = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    return indices, [7 + index * 13 % 40 for index in indices], world, micro


@given(steps(), st.booleans())
def test_each_record_of_a_step_is_in_one_micro_batch(step, packed):
    indices, lengths, world, micro = step
    ranks = rank_micro_batches(indices, lengths, world, micro, packed=packed)
    assert sorted(i for rank in ranks for one in rank for i in one) == sorted(indices)
    assert {len(one) for rank in ranks for one in rank} == {micro}
    assert len(ranks) == world
    assert len({len(rank) for rank in ranks}) == 1


@given(steps(), st.booleans())
def test_the_micro_batches_are_the_same_for_any_number_of_ranks(step, packed):
    indices, lengths, world, micro = step
    (alone,) = rank_micro_batches(indices, lengths, 1, micro, packed=packed)
    together = rank_micro_batches(indices, lengths, world, micro, packed=packed)
    assert sorted(alone) == sorted(one for rank in together for one in rank)


@given(steps())
def test_padded_micro_batches_have_no_more_padding_than_any_other_cut(step):
    indices, lengths, world, micro = step
    width = dict(zip(indices, lengths, strict=True))
    ranks = rank_micro_batches(indices, lengths, world, micro)
    found = sum(micro * max(width[i] for i in one) for rank in ranks for one in rank)
    # The longest record costs a whole micro-batch its width, and so does the longest of those that are left, ...
    least = sum(micro * length for length in sorted(lengths, reverse=True)[::micro])
    assert found == least


@given(steps(), st.booleans())
def test_ranks_have_as_much_to_do_at_each_turn_and_in_all(step, packed):
    indices, lengths, world, micro = step
    width = dict(zip(indices, lengths, strict=True))
    cost = [
        [(sum if packed else max)(width[i] for i in one) for one in rank]
        for rank in rank_micro_batches(indices, lengths, world, micro, packed=packed)
    ]
    turns = list(zip(*cost, strict=True))
    for now, after in itertools.pairwise(turns):
        assert min(now) >= max(after)  # so that the ranks wait least for each other
    totals = [sum(rank) for rank in cost]
    assert max(totals) - min(totals) <= max(max(turn) - min(turn) for turn in turns)


def test_packed_micro_batches_hold_like_sums_of_tokens():
    lengths = [90, 10, 80, 20, 70, 30, 60, 40]
    (alone,) = rank_micro_batches(range(8), lengths, 1, 2, packed=True)
    assert [sum(lengths[i] for i in one) for one in alone] == [100] * 4


def test_batch_sizes_that_cannot_be_met():
    with pytest.raises(UserError, match="global_batch_size 8 is not a multiple of micro_batch_size 3 x 2 ranks"):
        rank_micro_batches(list(range(8)), [1] * 8, 2, 3)
    with pytest.raises(UserError, match="no record to train on"):
        step_indices(0, 8, 0, 0)

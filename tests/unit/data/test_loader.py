from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.data.loader import epoch_at, epoch_order, rank_micro_batches, step_indices, total_steps
from calibtrain.errors import UserError


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))


def test_the_order_is_fixed_for_ever():
    assert epoch_order(8, 0, 0) == (5, 3, 7, 2, 1, 0, 4, 6)
    assert len({epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


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


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_and_accumulation_run_the_same_micro_batches(world, accumulation, micro):
    indices = step_indices(3, world * accumulation * micro, 50, 0)
    alone = rank_micro_batches(indices, 0, 1, micro)
    together = [batch for rank in range(world) for batch in rank_micro_batches(indices, rank, world, micro)]
    assert alone == together
    assert [i for batch in alone for i in batch] == indices
    assert {len(batch) for batch in alone} == {micro}


def test_batch_sizes_that_cannot_be_met():
    with pytest.raises(UserError, match="global_batch_size 8 is not a multiple of micro_batch_size 3 x 2 ranks"):
        rank_micro_batches(list(range(8)), 0, 2, 3)
    with pytest.raises(UserError, match="no record to train on"):
        step_indices(0, 8, 0, 0)

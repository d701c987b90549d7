import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import DEEP_CELLS, EDGES, NUM_CELLS, CalibrationState, state_of
from calibtrain.errors import UserError

samples = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40)


def build(pairs):
    q = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64)
    return state_of(q, torch.tensor([pair[1] for pair in pairs], dtype=torch.bool))


def assert_same(a, b):
    for name in CalibrationState.FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(samples, samples, samples)
def test_merge_is_associative_and_commutative(a, b, c):
    a, b, c = build(a), build(b), build(c)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(CalibrationState()), a)


@settings(max_examples=60)
@given(samples, st.lists(st.integers(0, 40), max_size=4), st.randoms(use_true_random=False))
def test_any_sharding_in_any_order_gives_the_state_of_the_whole(pairs, cuts, random):
    shuffled = random.sample(pairs, len(pairs))
    bounds = [0, *sorted(min(cut, len(pairs)) for cut in cuts), len(pairs)]  # equal cuts make empty shards
    merged = CalibrationState()
    for low, high in pairwise(bounds):
        merged = merged.merge(build(shuffled[low:high]))
    assert_same(merged, build(pairs))


def test_edges_belong_to_the_cell_below_zero_to_the_first_one_to_the_last():
    for value, cell in ((0.0, 0), (1.0, NUM_CELLS - 1)):
        assert int(build([(value, True)]).count.nonzero()) == cell
    for bins in (10, 15, 20, 30):
        edge = torch.tensor(1 / bins, dtype=torch.float64)
        below, above = build([(float(edge), True)]), build([(float(torch.nextafter(edge, edge + 1)), True)])
        assert float(EDGES[int(below.count.nonzero()) + 1]) == float(edge)
        assert int(above.count.nonzero()) == int(below.count.nonzero()) + 1


def test_weight_zero_is_never_looked_at_and_weight_two_counts_twice():
    q, y = torch.tensor([0.3, math.nan, 7.0, 0.9]), torch.tensor([1.0, 0.0, math.nan, 0.0])
    assert_same(
        state_of(q, y, torch.tensor([1, 0, 0, 2])), state_of(torch.tensor([0.3, 0.9, 0.9]), torch.tensor([1, 0, 0]))
    )
    assert_same(state_of(q, y, torch.zeros(4, dtype=torch.bool)), CalibrationState())


@pytest.mark.parametrize("value", [math.nan, -1e-9, 1.0000001, math.inf])
def test_no_probability_is_refused_and_leaves_the_state_alone(value):
    state = build([(0.5, True)])
    with pytest.raises(UserError, match="sample 1"):
        state.update(torch.tensor([0.5, value], dtype=torch.float64), torch.tensor([1, 1]))
    assert_same(state, build([(0.5, True)]))


@pytest.mark.parametrize(
    ("correct", "weight", "message"),
    [
        (torch.tensor([0.5, 1.0]), None, "neither 0 nor 1"),
        (torch.tensor([1.0, math.nan]), None, "neither 0 nor 1"),
        (torch.tensor([1]), None, "equally many"),
        (torch.tensor([1, 0]), torch.tensor([1, -1]), "whole numbers"),
        (torch.tensor([1, 0]), torch.tensor([0.5, 1.0]), "whole numbers"),
    ],
)
def test_bad_grades_and_weights_are_refused(correct, weight, message):
    with pytest.raises(UserError, match=message):
        CalibrationState().update(torch.tensor([0.5, 0.5]), correct, weight)


def test_state_dict_round_trip_is_a_copy():
    state = build([(0.2, True), (0.8, False)])
    saved = state.state_dict()
    state.update(torch.tensor([0.5]), torch.tensor([1]))
    restored = CalibrationState()
    restored.load_state_dict(saved)
    assert_same(restored, build([(0.2, True), (0.8, False)]))
    restored.update(torch.tensor([0.5]), torch.tensor([1]))
    assert_same(restored, state)
    assert summary(restored) == pytest.approx(summary(state), nan_ok=True)


def test_tensors_of_another_grid_are_refused():
    tensors = CalibrationState().tensors()
    tensors["count"] = tensors["count"][:-1]
    with pytest.raises(UserError, match="another grid"):
        CalibrationState.from_tensors(tensors)
    with pytest.raises(UserError, match="expected the tensors"):
        CalibrationState.from_tensors({"count": tensors["count"]})


def test_a_state_of_an_earlier_version_is_placed():
    """Its first cell held all below 2^-24, which ties now in the cell below it; the others are where they were."""
    q, y = torch.tensor([2.0**-25, 1e-4, 0.3, 0.999, 1.0]), torch.tensor([False, True, False, True, True])
    state = state_of(q, y)
    first = int(state.count.nonzero()[0])
    earlier = {
        name: x if len(x) < NUM_CELLS else torch.cat([x[: DEEP_CELLS + 1].sum(0, keepdim=True), x[DEEP_CELLS + 1 :]])
        for name, x in state.tensors().items()
    }
    placed = CalibrationState()
    placed.load_state_dict(earlier)
    moved = state.tensors()
    for name in ("count", "confidence"):
        moved[name][DEEP_CELLS], moved[name][first] = moved[name][first].clone(), 0
    assert_same(placed, CalibrationState.from_tensors(moved))
    assert summary(placed) == pytest.approx(summary(state), nan_ok=True)


def test_cells_reach_down_to_answers_of_hundreds_of_nats():
    assert bool((EDGES.diff() > 0).all())
    assert EDGES[1] == 2.0**-1000
    assert EDGES[DEEP_CELLS + 1] == 2.0**-24
    deep = EDGES[1 : DEEP_CELLS + 2].log2()
    assert float((deep[:-1] / deep[1:]).max()) < 1.004


def test_all_reduce_without_process_group_is_a_copy():
    state = build([(0.2, True)])
    reduced = state.all_reduce()
    assert_same(reduced, state)
    reduced.update(torch.tensor([0.5]), torch.tensor([1]))
    assert state.n == 1


def test_low_precision_and_gradients_are_accepted():
    q = torch.tensor([0.25, 0.75], dtype=torch.bfloat16, requires_grad=True)
    assert_same(state_of(q, torch.tensor([True, False])), build([(0.25, True), (0.75, False)]))

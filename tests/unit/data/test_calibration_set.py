from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.data.calibration_set import choose_calibration_set, composition_distance, largest_remainder
from calibtrain.errors import UserError
from calibtrain.records import Message, Record


def records(counts, start=0):
    made = [
        Record(
            (Message("user", f"{continent}/{band}/{i + start}"),), strata={"continent": continent, "population": band}
        )
        for (continent, band), n in counts.items()
        for i in range(n)
    ]
    order = np.random.default_rng(0).permutation(len(made))
    return [made[i] for i in order]


SOURCE = records({("Asia", "small"): 500, ("Asia", "large"): 250, ("Europe", "small"): 200, ("Oceania", "large"): 50})


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_largest_remainder(counts, fraction):
    seats = int(fraction * sum(counts))
    allocated = largest_remainder(counts, seats)
    assert sum(allocated) == seats
    for got, count in zip(allocated, counts, strict=True):
        quota = count * seats / max(1, sum(counts))
        assert np.floor(quota - 1e-9) <= got <= np.ceil(quota + 1e-9)
        assert got <= count


def test_the_choice_has_the_makeup_of_its_source():
    chosen = choose_calibration_set(SOURCE, 128)
    cells = Counter((one.strata["continent"], one.strata["population"]) for one in chosen)
    assert cells == {("Asia", "small"): 64, ("Asia", "large"): 32, ("Europe", "small"): 26, ("Oceania", "large"): 6}
    assert chosen == [one for one in SOURCE if one in chosen]
    assert choose_calibration_set(SOURCE, len(SOURCE)) == SOURCE
    assert choose_calibration_set(SOURCE, 0) == []


def test_the_earliest_of_each_stratum_are_chosen():
    chosen = choose_calibration_set(SOURCE, 100)
    oceania = [one for one in SOURCE if one.strata["continent"] == "Oceania"]
    assert [one for one in chosen if one.strata["continent"] == "Oceania"] == oceania[:5]


def test_the_makeup_may_be_that_of_another_set():
    like = records({("Asia", "small"): 1, ("Europe", "small"): 3})
    chosen = choose_calibration_set(SOURCE, 40, like=like)
    assert Counter(one.strata["continent"] for one in chosen) == {"Asia": 10, "Europe": 30}
    # 250 of Europe are wanted and 200 there: the earliest of the others take their seats.
    chosen = choose_calibration_set(SOURCE, 250, like=records({("Europe", "small"): 3}))
    others = [one for one in SOURCE if one.strata["continent"] != "Europe"]
    assert [one for one in chosen if one in others] == others[:50]
    assert len(chosen) == 250


def test_too_few_records():
    with pytest.raises(UserError, match="1001 questions cannot be chosen from 1000"):
        choose_calibration_set(SOURCE, 1001)


def test_records_without_strata_are_one_stratum():
    plain = [Record((Message("user", str(i)),)) for i in range(10)]
    assert choose_calibration_set(plain, 4) == plain[:4]
    assert "cannot be compared" in composition_distance(plain[:4], plain).verdict


def test_a_stratified_set_is_near_and_a_skewed_one_far():
    near = composition_distance(choose_calibration_set(SOURCE, 128), SOURCE)
    assert near.verdict.startswith("The make-up of these 128 questions is as close to the source's as chance allows")
    assert [stratum.key for stratum in near.strata] == ["continent", "population"]
    assert all(stratum.p_value > 0.9 for stratum in near.strata)
    skewed = composition_distance([one for one in SOURCE if one.strata["continent"] != "Asia"][:128], SOURCE)
    assert skewed.strata[0].p_value < 0.001
    assert skewed.strata[0].farther_than_chance
    assert "too few of 'Asia' (0.0% instead of 75.0%)" in skewed.verdict
    assert skewed.strata[0].total_variation == pytest.approx(0.75)


def test_the_null_rejects_random_draws_one_time_in_twenty():
    rng = np.random.default_rng(1)
    other = records({("Asia", "x"): 500, ("Europe", "x"): 300, ("Africa", "x"): 200})
    far = 0
    for trial in range(200):
        order = rng.permutation(len(other))
        chosen, source = [other[i] for i in order[:200]], [other[i] for i in order[200:]]
        [continent, _] = composition_distance(chosen, source, seed=trial).strata
        far += continent.farther_than_chance
    assert 1 <= far <= 22  # Binomial(200, 0.05): beyond this once in a thousand


def test_a_value_that_one_side_lacks_counts():
    asia, mixed = records({("Asia", "x"): 10}), records({("Asia", "x"): 5, ("Africa", "x"): 5})
    [continent, _] = composition_distance(asia, mixed).strata
    assert continent.total_variation == pytest.approx(0.5)
    assert continent.set_shares == {"Africa": 0.0, "Asia": 1.0}
    with pytest.raises(UserError, match="empty"):
        composition_distance([], mixed)

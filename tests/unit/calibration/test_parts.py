"""Calibrators of parts: by field where there is enough, pooled elsewhere, with intervals from resampling questions."""

import json

import numpy as np
import pytest

from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.parts import METHOD, OUTCOMES, QUESTIONS, PartCalibrators, field_name, fit_parts
from calibtrain.errors import UserError

HASHES = {"template_hash": "t", "weights_hash": "w"}


def parts(questions=120, seed=0):
    """Two fields that are calibrated otherwise, and a rare one."""
    rng = np.random.default_rng(seed)
    names, q, ids = [], rng.uniform(0.05, 0.95, 2 * questions + 5), []
    for i in range(questions):
        names += ["city", f"stops[{i % 3}].name"]
        ids += [i, i]
    names, ids = names + ["rare"] * 5, ids + list(range(5))
    chance = np.where([name == "city" for name in names], q, q / 3)
    return names, q, (rng.random(len(q)) < chance).astype(float), np.array(ids)


def test_each_field_has_its_own_and_the_rare_one_the_pooled():
    names, q, y, ids = parts()
    found = fit_parts(names, q, y, ids, **HASHES)
    assert set(found.fields) == {"city", "stops[].name"}
    assert found.pooled.n == len(q)
    mine = np.array([name == "city" for name in names])
    alone = fit_calibrator(METHOD, q[mine], y[mine], ids=ids[mine], **HASHES)
    assert found.fields["city"] == alone
    probability = found.apply(names, q)
    assert probability[mine] == pytest.approx(alone.apply(q[mine]))
    assert probability[-5:] == pytest.approx(found.pooled.apply(q[-5:]))
    others = np.array([name.startswith("stops") for name in names])
    assert abs(probability[others].mean() - y[others].mean()) < 0.02
    assert found.apply([], []).tolist() == []
    assert field_name('stops[12].tags[0]["3"]') == 'stops[].tags[]["3"]'


def test_a_field_needs_enough_questions_and_both_outcomes():
    names, q, y, ids = parts(QUESTIONS - 1)
    assert fit_parts(names, q, y, ids, **HASHES).fields == {}
    names, q, y, ids = parts(QUESTIONS)
    y[[name == "city" for name in names]] = 1.0
    y[[i for i, name in enumerate(names) if name == "city"][: OUTCOMES - 1]] = 0.0
    assert "city" not in fit_parts(names, q, y, ids, **HASHES).fields


def test_parts_of_one_name_have_one_calibrator():
    _, q, y, ids = parts()
    found = fit_parts(["claim"] * len(q), q, y, ids, **HASHES)
    assert found.fields == {}
    assert found.pooled.n == len(q)


def test_intervals_are_wider_where_a_questions_parts_depend_on_each_other():
    rng = np.random.default_rng(1)
    q = np.repeat(rng.uniform(0.1, 0.9, 80), 5)
    y = np.repeat((rng.random(80) < q[::5]).astype(float), 5)
    names = ["claim"] * 400
    together = fit_parts(names, q, y, np.repeat(np.arange(80), 5), **HASHES).pooled
    apart = fit_parts(names, q, y, np.arange(400), **HASHES).pooled

    def width(one):
        return one.high["slope"] - one.low["slope"]

    assert together.parameters == apart.parameters
    assert width(together) > 1.6 * width(apart)  # sqrt(5) = 2.2


def test_json_and_back():
    found = fit_parts(*parts(), **HASHES)
    content = json.loads(json.dumps(found.as_dict()))
    assert PartCalibrators.from_dict(content, **HASHES) == found
    with pytest.raises(UserError, match="prompt template"):
        PartCalibrators.from_dict(content, template_hash="other", weights_hash="w")
    with pytest.raises(UserError, match="pooled"):
        PartCalibrators.from_dict({"pooled": content["pooled"]}, **HASHES)

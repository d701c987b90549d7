"""What is said of answers among options, by place and by class, and what cannot be calibrated told before long work."""

from dataclasses import replace

import numpy as np
import pytest

from calibtrain.calibration.calibrators import Calibrator
from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.pipeline.options import check_options, option_matrices, options_part, print_options
from calibtrain.pipeline.report import Measured, ReportData, render_report
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of


def answered(n=200, options=("A", "B", "C"), seed=0, preferred=1.5):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        right = int(rng.integers(len(options)))
        z = rng.normal(0, 1, len(options)) + 1.5 * np.eye(len(options))[right] + preferred * np.eye(len(options))[0]
        logprobs = z - np.log(np.exp(z).sum())
        text = options[int(logprobs.argmax())]
        found.append(
            Answer(f"q{i}", "?", text, (-1.0,), text == options[right], (options[right],), options=options,
                   option_logprobs=tuple(logprobs.tolist()))
        )  # fmt: skip
    return found


def test_a_preferred_place_is_told(capsys):
    answers = answered()
    part = options_part("positions", answers)
    assert part.names == ("A", "B", "C")
    assert part.bias.p_value < 1e-4
    assert sum(part.bias.answered) == sum(part.bias.right) == 200
    print_options(part)
    told = capsys.readouterr().out
    assert "answers by place" in told
    assert f"{part.bias.answered[0] / 200:.1%}" in told
    # Answered freely: no probabilities of the options, and some replies are none of them.
    free = [replace(one, option_logprobs=()) for one in answers]
    free[0] = replace(free[0], text="maybe", found=False, correct=False)
    again = options_part("positions", free)
    assert (again.bias.n, again.unfound) == (199, 1)
    print_options(again)
    assert "1 answers are none of the options" in capsys.readouterr().out
    assert options_part(None, answers) is None
    assert options_part("positions", [replace(one, correct=None) for one in answers]) is None


def test_classes_are_told_before_and_after_a_calibrator_of_them_all(capsys):
    answers = answered(options=("good", "bad", "[red]so-so"))
    part = options_part("classes", answers)
    assert [row.n for row in part.rows] == [sum(one.accepted == (name,) for one in answers) for name in part.names]
    print_options(part)
    assert "[red]so-so" in capsys.readouterr().out
    bare = {"low": {}, "high": {}, "level": 0.95, "n": 1, "nll_before": None, "nll_after": None}
    hashes = {"template_hash": "t", "weights_hash": "w"}
    mends = Calibrator("vector_scaling", {"scale": [1.5] * 3, "bias": [-2.25, 0.0, 0.0]}, **bare, **hashes)
    after = options_part("classes", answers, mends)
    assert after.classwise_ece < part.classwise_ece
    assert [row.answered for row in after.rows] == [row.answered for row in part.rows]  # the answers stay
    assert (
        options_part("classes", answers, replace(mends, method="temperature", parameters={"temperature": 1.0})) is None
    )
    assert options_part("classes", [replace(one, option_logprobs=()) for one in answers]) is None


def test_options_as_matrices_need_as_many_for_each():
    answers = answered(5)
    logprobs, right = option_matrices(answers)
    assert logprobs.shape == right.shape == (5, 3)
    assert (right.sum(1) == 1).all()
    assert option_matrices([*answers, *answered(1, ("A", "B"))]) == (None, None)
    assert option_matrices([replace(answers[0], option_logprobs=())]) == (None, None)


def test_what_a_calibrator_of_options_cannot_read_is_named_before_long_work():
    def record(*options):
        return Record(
            (Message("user", "Which?"),), "A", accepted=("A",), options=options, origin=f"rows:{len(options)}"
        )

    def check(task, *records):
        config = RunConfig(task=task, calibration={"method": "matrix_scaling"})
        kind = task_of(config.task)
        asked = [kind.asked(one) for one in records]
        check_options(config, kind, {"temperature": asked, "certification": [], "test": []})

    letters = {"kind": "choice"}
    check(letters, record("x", "y"), record("z", "v"))
    with pytest.raises(UserError, match="rows:3: 3 options where others have 2"):
        check(letters, record("x", "y"), record("x", "y", "z"))
    with pytest.raises(UserError, match="no options that are scored"):
        check({**letters, "answer_by": "generation"}, record("x", "y"))
    with pytest.raises(UserError, match="no options that are scored"):
        check({"kind": "short_answer"}, record())


@pytest.mark.parametrize(
    ("options_are", "title"), [("positions", "Does it prefer a place?"), ("classes", "Is every class")]
)
def test_the_report_has_a_part_of_them_and_escapes_names(options_are, title):
    answers = answered(options=("good", "bad", "<b>so-so"))
    data = ReportData(
        "x", {}, {}, None, None, [Measured("m", answers)], 0.2, 0.05, bootstrap_replicates=2, samples=False
    )
    assert title not in render_report(data)
    page = render_report(replace(data, options=options_part(options_are, answers)))
    assert title in page
    assert "<b>so-so" not in page

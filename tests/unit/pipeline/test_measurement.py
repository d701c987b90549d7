"""Files of graded answers that other people wrote: read, or refused in one line that names the file and the row."""

import json

import pytest

from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.errors import UserError
from calibtrain.pipeline.measurement import read_measurement

GRID = [-1.0] * len(TEMPERATURE_GRID)
ROW = {"question_id": "x", "question": "q", "text": "t", "token_logprobs": [-1.0], "correct": True, "logprobs_at": []}


def write(tmp_path, *rows):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("table", [[], GRID])
def test_a_byte_order_mark_is_no_fault(tmp_path, table):
    path = write(tmp_path, {"logprobs_at": table}, {"logprobs_at": table})
    plain = read_measurement(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read_measurement(path)
    assert found.answers == plain.answers
    assert found.table.shape == (2, len(table))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logprobs_at": [1.0]}, "`logprobs_at` holds 1 numbers; it is 25, as in line 1"),
        ({"logprobs_at": []}, "`logprobs_at` holds 0 numbers; it is 25, as in line 1"),
        ({"logprobs_at": "x"}, "`logprobs_at` is 'x'; it is a list of numbers"),
        ({"logprobs_at": 3}, "`logprobs_at` is 3; it is a list"),
        ({"logprobs_at": [*GRID[1:], "x"]}, "`logprobs_at` is .*a list of numbers"),
        ({"logprobs_at": [*GRID[1:], float("nan")]}, "`logprobs_at` holds NaN"),
        ({"logprobs_at": [*GRID[1:], 10**400]}, "int too large"),
        ({"token_logprobs": ["x"]}, r"`token_logprobs` is \['x'\]; it is a list of numbers"),
        ({"told": 10**400, "told_by": "m"}, "int too large"),
        ({"strata": [1]}, r"`strata` is \[1\]; it is an object"),
        ({"accepted": "x"}, "`accepted` is 'x'; it is a list of texts"),
        ({"text": 3}, "`text` is 3; it is text"),
    ],
)
def test_a_row_that_is_no_graded_answer_is_named(tmp_path, values, message):
    path = write(tmp_path, {"logprobs_at": GRID}, {"logprobs_at": GRID, **values})
    with pytest.raises(UserError, match=rf"answers.jsonl:2: not a graded answer \(.*{message}"):
        read_measurement(path)


def test_the_first_row_says_of_what_temperatures_it_tells(tmp_path):
    with pytest.raises(UserError, match=r"answers.jsonl:1: .*`logprobs_at` holds 2 numbers; it is 25, or none"):
        read_measurement(write(tmp_path, {"logprobs_at": [1.0, 2.0]}))

"""Samples of lm-evaluation-harness, in the shape its --log_samples writes, become the report."""

import json
import math

import pytest

from calibtrain.errors import UserError
from calibtrain.pipeline import lm_eval
from tests.unit.pipeline.lm_eval_rows import choice_row, generation_row


def written(tmp_path, rows, name="samples_arc_easy_2026-01-05T10-11-12.000001.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_multiple_choice_is_as_sure_as_the_softmax_over_its_options(tmp_path):
    rows = [choice_row(0, [-4.0, -2.0, -3.5, -9.0], 1), choice_row(1, [-1000.0, -1001.0, -1002.0, -1003.0], 2)]
    first, second = lm_eval.read_samples(written(tmp_path, rows)).answers
    expected = 1 / (math.exp(-2) + 1 + math.exp(-1.5) + math.exp(-7))
    assert first.confidence == pytest.approx(expected, rel=1e-12)
    assert (first.correct, first.text, first.accepted) == (True, "option 1", ("option 1",))
    assert first.question == "Question 0?"
    assert second.correct is False
    assert second.confidence == pytest.approx(1 / sum(math.exp(-i) for i in range(4)), rel=1e-12)


def test_options_that_stand_in_the_prompts_and_unconditional_requests(tmp_path):
    row = choice_row(0, [-4.0, -2.0], 1)
    row["arguments"] = {
        f"gen_args_{i}": {"arg_0": f"The box did not fit as the {name}", "arg_1": " was too large."}
        for i, name in enumerate(("case", "box"))
    }
    assert lm_eval.read_samples(written(tmp_path, [row])).answers[0].text.endswith("the box")
    row = choice_row(0, [-4.0, -2.0, -1.0, -0.5], 1, acc_mutual_info=1.0)
    for i in (2, 3):
        row["arguments"][f"gen_args_{i}"]["arg_0"] = ""
    answer = lm_eval.read_samples(written(tmp_path, [row])).answers[0]
    assert answer.text == "option 1"
    assert answer.confidence == pytest.approx(1 / (1 + math.exp(-2)))


def test_arguments_of_older_harnesses_are_lists(tmp_path):
    row = choice_row(0, [-4.0, -2.0], 1)
    row["arguments"] = [["Question: Q?\nAnswer:", " left"], ["Question: Q?\nAnswer:", " right"]]
    row["filtered_resps"] = [[-4.0, False], [-2.0, True]]
    assert lm_eval.read_samples(written(tmp_path, [row])).answers[0].text == "right"


def test_generated_answers_are_as_sure_as_they_state_or_agree(tmp_path):
    repeats = ["Paris", "paris.", "Lyon", "Paris"]
    rows = [
        generation_row(0, ["Paris (confidence: 80%)"], "Paris", 1.0),
        generation_row(1, repeats, "Paris", 0.0),
        generation_row(2, repeats, "Paris", 1.0) | {"filtered_resps": [repeats]},
    ]
    stated, agreed, kept = lm_eval.read_samples(written(tmp_path, rows)).answers
    assert (stated.text, stated.correct) == ("Paris", True)
    assert stated.confidence == pytest.approx(0.8)
    assert (agreed.confidence, agreed.correct) == (pytest.approx(0.75), False)
    assert kept.confidence == pytest.approx(0.75)


def test_of_kept_repeats_the_harness_logs_the_share_that_is_right(tmp_path):
    """As lm_eval 0.4 does with `take_first_k`: seen in its own samples."""
    kept = [
        generation_row(0, texts, "India", share) | {"filtered_resps": [texts], "resps": [texts]}
        for texts, share in ((["India", "Iran", "india", "Peru"], 0.5), (["Iran", "India", "India", "India"], 0.75))
    ]
    rows = [row | {"doc_id": i} for i, row in enumerate(kept)]
    first, second = lm_eval.read_samples(written(tmp_path, rows)).answers
    assert (first.correct, first.confidence) == (True, pytest.approx(0.5))
    assert (second.correct, second.confidence) == (False, pytest.approx(0.25))
    with pytest.raises(UserError, match="does not tell"):
        lm_eval.read_samples(written(tmp_path, [rows[0] | {"exact_match": 0.25}]))


def test_of_several_filters_the_first_is_read_and_named(tmp_path):
    strict = [generation_row(i, ["4 (confidence: 0.9)"], "4", 1.0, name="strict-match") for i in range(2)]
    loose = [generation_row(i, ["4 (confidence: 0.9)"], "4", 0.0, name="flexible-extract") for i in range(2)]
    found = lm_eval.read_samples(written(tmp_path, [*strict, *loose]))
    assert [answer.correct for answer in found.answers] == [True, True]
    assert found.label.endswith("filter strict-match")


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


CHOICE, TEXT = choice_row(3, [-1.0, -2.0], 0), generation_row(3, ["Paris"], "Paris", 1.0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (without(CHOICE, "filtered_resps"), "`filtered_resps` is missing"),
        (without(CHOICE, "doc_id"), "`doc_id` is missing"),
        (without(CHOICE, "acc"), "neither multiple choice"),
        (CHOICE | {"acc": 0.5}, "`acc` is 0.5"),
        (CHOICE | {"filtered_resps": []}, "is empty"),
        (CHOICE | {"filtered_resps": [["-1.0", "True"], ["nothing", "False"]]}, r"`filtered_resps\[1\]`: \['nothing'"),
        (CHOICE | {"filtered_resps": [["nan", "True"], ["-1.0", "False"]]}, "is no number"),
        (CHOICE | {"filtered_resps": [["-1.0", "True"]] * 3}, "`arguments` holds 2 requests"),
        (TEXT, "no confidence of a generated answer"),
        (TEXT | {"filtered_resps": [7]}, "is no text"),
        (CHOICE | {"filtered_resps": [["-inf", "True"], ["-inf", "False"]]}, "log-prob -inf for every option"),
        (CHOICE | {"filtered_resps": [[10**400, "True"], ["-1.0", "False"]]}, r"`filtered_resps\[0\]`"),
        (CHOICE | {"arguments": [1, 2]}, r"`arguments\[0\]` is 1; a request is a list"),
        (CHOICE | {"arguments": 5}, "`arguments` is 5; it is a list of requests"),
        (TEXT | {"filtered_resps": [["a", "b"]], "exact_match": 10**400}, "over 2 repeats"),
        ([CHOICE], "an object, not list"),
        (choice_row(0, [-1.0, -2.0], 0), "`doc_id` 0 occurs twice"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_key(row, words, tmp_path):
    path = written(tmp_path, [choice_row(0, [-1.0, -2.0], 0), row])
    with pytest.raises(UserError, match=words) as caught:
        lm_eval.read_samples(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_that_hold_no_samples(tmp_path):
    (tmp_path / "results.json").write_text("{\n")
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "long.jsonl").write_text('{"acc": ' + "1" * 5000 + "}")
    found = {"no.jsonl": "no such file", **dict.fromkeys(("results.json", "deep.jsonl", "long.jsonl"), ":1: not JSON")}
    for path, words in ((tmp_path / name, words) for name, words in found.items()):
        with pytest.raises(UserError, match=words):
            lm_eval.read_samples(path)
    with pytest.raises(UserError, match="no samples"):
        lm_eval.read_samples(written(tmp_path, []))


def test_a_binary_file_is_named_and_a_line_may_hold_any_character(tmp_path):
    path = written(tmp_path, [])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        lm_eval.read_samples(path)
    row = choice_row(0, [-1.0, -2.0], 0)
    row["doc"]["question"] = "a\u2028b"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert lm_eval.read_samples(path).answers[0].question == "a\u2028b"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert lm_eval.read_samples(path).answers[0].question == "a\u2028b"
    row["target"] = "\u00b2"  # a digit, and no number
    assert lm_eval.read_samples(written(tmp_path, [row])).answers[0].accepted == ("\u00b2",)


def test_the_report_is_written_beside_the_samples(tmp_path):
    rows = [choice_row(i, [-1.0 - i % 3, -1.5, -2.0], i % 2) for i in range(40)]
    page = lm_eval.run(written(tmp_path, rows))
    text = page.read_text("utf-8")
    assert page.name == "samples_arc_easy_2026-01-05T10-11-12.000001.html"
    right = sum(row["acc"] for row in rows)
    assert f"right on {100 * right / 40:.0f}% of 40 test questions" in text
    assert "No threshold is certified" in text

import math
from dataclasses import replace

import pytest

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import cut_left, encode_answer, encode_records
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer


def record(question="In which country is the city of Lyon?", chosen="France", rejected="Japan", origin=""):
    return Record((Message("user", question),), chosen, rejected, origin=origin)


@pytest.fixture(params=[False, True], ids=["pad", "pad_is_eos"])
def template(request):
    return Template("plain", tiny_tokenizer(pad_is_eos=request.param))


def test_pairs_share_one_prompt(template):
    drops = DropReport()
    [(chosen, rejected)] = encode_records([record()], template, 64, pairs=True, drops=drops)
    prompt = template.prompt_ids(record())
    assert chosen.ids == (*prompt, *template.completion_ids("France"))
    assert rejected.ids == (*prompt, *template.completion_ids("Japan"))
    assert (chosen.role, rejected.role) == (CHOSEN, REJECTED)
    assert chosen.completion_start == rejected.completion_start == len(prompt)
    assert chosen.pair_id == rejected.pair_id == 0
    assert math.isnan(chosen.correct)
    assert chosen.completion_length == len(template.completion_ids("France"))
    assert drops.lines() == []


def test_supervised_examples_are_no_pairs(template):
    [(chosen,)] = encode_records([record()], template, 64, pairs=False, drops=DropReport())
    assert (chosen.role, chosen.pair_id) == (CHOSEN, -1)


def test_the_prompt_is_cut_from_the_left_and_the_answer_never(template):
    long = record("word " * 100 + "Lyon?", "France", "The quick brown fox jumps over the lazy dog")
    drops = DropReport()
    [(chosen, rejected)] = encode_records([long], template, 40, pairs=True, drops=drops)
    assert len(rejected.ids) == 40
    assert chosen.ids[chosen.completion_start :] == tuple(template.completion_ids("France"))
    assert rejected.ids[rejected.completion_start :] == tuple(template.completion_ids(long.rejected))
    assert chosen.ids[: chosen.completion_start] == rejected.ids[: rejected.completion_start]
    assert template.tokenizer.decode(chosen.ids[: chosen.completion_start]).endswith("Lyon?\nAnswer:")
    assert drops.shortened == 1
    assert drops.total == 0
    assert drops.lines() == ["1 prompts cut from the left to fit max_length"]


def test_an_answer_that_leaves_no_room_drops_the_row_and_keeps_the_indices(template):
    length = len(template.completion_ids("The quick brown fox"))
    records = [record(), record(rejected="The quick brown fox", origin="f:2"), record(chosen="France")]
    drops = DropReport()
    examples = encode_records(records, template, length, pairs=True, drops=drops)
    assert [example[0].record_id for example in examples] == [0, 2]
    assert drops.lines()[0] == f"1 dropped: the answer alone fills max_length {length} (e.g. f:2)"
    assert len(encode_records(records, template, length + 1, pairs=True, drops=DropReport())) == 3


def test_rows_without_what_they_need_are_counted(template):
    records = [record(rejected=None, origin="f:1"), record(chosen=None, origin="f:2"), record(rejected=" "), record()]
    drops = DropReport()
    examples = encode_records(records, template, 64, pairs=True, drops=drops)
    assert [example[0].record_id for example in examples] == [3]
    assert drops.dropped == {"no rejected answer": 2, "no answer": 1}
    assert len(encode_records(records, template, 64, pairs=False, drops=DropReport())) == 3


def test_nothing_left_is_an_error(template):
    with pytest.raises(UserError, match="no training record is left: 1 dropped: no rejected answer"):
        encode_records([record(rejected=None)], template, 64, pairs=True, drops=DropReport())
    assert encode_records([], template, 64, pairs=True, drops=DropReport()) == []


def test_own_answers(template):
    own = encode_answer(record(), "Japan", False, template, 64, record_id=5)
    assert own is not None
    assert (own.role, own.record_id, own.correct, own.pair_id) == (ANSWER, 5, 0.0, -1)
    silent = encode_answer(record(), "", False, template, 64, record_id=5)
    assert silent is not None
    assert silent.ids[silent.completion_start :] == (template.end_id,)
    assert encode_answer(record(), "Japan " * 80, True, template, 64, record_id=5) is None


def test_cut_left_keeps_bos_but_not_a_turn_mark():
    assert cut_left([9, 1, 2, 3, 4], 3, bos_id=9) == [9, 3, 4]
    assert cut_left([9, 1, 9, 3, 4], 3, bos_id=9) == [9, 3, 4]
    assert cut_left([9, 1, 9, 3, 4], 2, bos_id=9) == [3, 4]
    assert cut_left([1, 2, 3], 2, bos_id=None) == [2, 3]
    assert cut_left([9, 1, 2], 1, bos_id=9) == [2]
    assert cut_left([9, 1], 2, bos_id=9) == [9, 1]


def test_bos_survives_the_cut():
    template = Template("plain", tiny_tokenizer(add_bos=True))
    [(chosen,)] = encode_records([record("word " * 100)], template, 30, pairs=False, drops=DropReport())
    assert len(chosen.ids) == 30
    assert chosen.ids[0] == template.tokenizer.bos_token_id
    assert chosen.ids.count(chosen.ids[0]) == 1


def test_a_pair_of_one_and_the_same_answer_teaches_nothing(template):
    same, other = (
        Record((Message("user", "Q?"),), "yes", wrong, origin=f"pairs.jsonl:{i}")
        for i, wrong in enumerate(("yes", "no"))
    )
    drops = DropReport()
    found = encode_records([same, other], template, 64, True, drops)
    assert [group[0].record_id for group in found] == [1]
    assert drops.lines() == ["1 dropped: chosen and rejected are the same answer (e.g. pairs.jsonl:0)"]


def test_a_row_of_no_weight_is_left_out_and_the_others_keep_theirs(template):
    records = [replace(record(origin="f:1"), weight=0.0), replace(record(), weight=2.5)]
    drops = DropReport()
    [(one,)] = encode_records(records, template, 64, pairs=False, drops=drops)
    assert (one.record_id, one.weight) == (1, 2.5)
    assert drops.lines() == ["1 dropped: weight 0 (e.g. f:1)"]

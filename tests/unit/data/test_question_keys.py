"""A question is one question whatever stands around it: what is held out is not trained on, shown or asked elsewhere."""

import json
import unicodedata

import pytest

from calibtrain.config import RunConfig
from calibtrain.data.layout import Layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Message, Record, ToolCall
from tests.tiny import tiny_tokenizer

HELD = ("calibration", "temperature", "certification", "test")
SIZES = {"train": None, **dict.fromkeys(HELD, 10)}


def prepared(folder, rows, questions=None, **sections):
    def source(name, some):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
        return {"kind": "file", "path": str(folder / name), **sections.pop(name, {})}

    data = {"source": source("rows.jsonl", rows), "splits": SIZES, **sections.pop("data", {})}
    if questions is not None:
        data["questions"] = source("asked.jsonl", questions)
    values = {"data": data, "objective": {"name": "sft"}, "penalties": [], **sections}
    return prepare(RunConfig.model_validate(values))


def graded(i):
    return {"question": f"What is {i}?", "answers": [str(i)]}


def held_texts(found):
    return {record.question.split("\n")[0] for name in HELD for record in found.splits[name]}


def trained_texts(found):
    return {record.question.split("\n")[0] for record in found.splits["train"]}


def test_another_system_text_makes_no_other_question(tmp_path):
    def talk(i):
        turns = [("system", "Be brief."), ("user", f"What is {i}?"), ("assistant", f"{i}.")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    found = prepared(tmp_path, map(talk, range(300)), map(graded, range(200)))
    assert trained_texts(found)
    assert held_texts(found).isdisjoint(trained_texts(found))
    bare, under = (Record((*turns, Message("user", "Why?"))) for turns in ((), (Message("system", "Be brief."),)))
    assert bare.id == bare.key == under.key != under.id


def test_options_in_another_order_make_no_other_question(tmp_path):
    rows = [
        {"question": f"What is {i}?", "a": order[0], "b": order[1], "answer": "x"}
        for i in range(200)
        for order in (("x", "y"), ("y", "x"))
    ]
    columns = {"columns": {"options": ["a", "b"], "answers": "answer"}}
    found = prepared(tmp_path, rows, task={"kind": "choice"}, **{"rows.jsonl": columns})
    assert trained_texts(found)
    assert held_texts(found).isdisjoint(trained_texts(found))


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_of_ones_own_are_asked_nowhere(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    examples = [{"question": f"What is {i}?", "answer": str(i)} for i in range(40)]
    found = prepared(
        tmp_path, map(graded, range(300)), data={"examples": examples}, **{"rows.jsonl": {"streaming": streaming}}
    )
    shown = {one["question"] for one in examples}
    assert shown.isdisjoint(held_texts(found) | trained_texts(found))


def test_a_validation_question_is_no_earlier_turn_of_what_is_trained(tmp_path):
    def talk(i):
        asked = [f"What is {i}?", f"What is {i + 1}?"]
        said = [(role, text) for one in asked for role, text in (("user", one), ("assistant", "So."))]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    def single(i):
        return {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "So."}]}

    rows = [*map(talk, range(200)), *map(single, range(200))]
    found = prepared(tmp_path, rows, data={"splits": {"train": None, "validation": 15, **dict.fromkeys(HELD, 0)}})
    asked = {record.key for record in found.splits["validation"]}
    assert all(asked.isdisjoint(record.taught) for record in found.splits["train"])


def test_rows_that_differ_in_what_the_prompt_reads_are_several(tmp_path):
    rows = [{"question": "What is the capital?", "answers": ["?"], "country": one} for one in ("France", "Spain")]
    columns = {"columns": {"fields": ["country"]}}
    splits = {"splits": {"train": None, **dict.fromkeys(HELD, 0)}}
    assert len(prepared(tmp_path, rows, data=splits, **{"rows.jsonl": columns}).splits["train"]) == 2


def test_a_gap_between_options_is_refused_and_letters_say_their_order():
    layout = Layout({"question": "question", "answers": "answer"}, options=("a", "b", "c"))
    row = {"question": "Which?", "answer": "x", "a": "x", "c": "z"}
    with pytest.raises(UserError, match="column 'b' is empty, and an option stands behind it"):
        record_from_row(row, layout, "rows:1")
    assert record_from_row({**row, "b": "y", "c": None}, layout, "rows:1").options == ("x", "y")
    listed = Layout({"question": "question", "answers": "answer", "options": "choices"})
    choices = {"text": ["two", "one"], "label": ["B", "A"]}
    assert record_from_row({**row, "choices": choices}, listed, "rows:1").options == ("one", "two")
    for labels in (["10", "2", "1"], [10, 2, 1], [" 10", "2", "01"]):
        numbered = {"text": ["tenth", "second", "first"], "label": labels}
        assert record_from_row({**row, "choices": numbered}, listed, "rows:1").options == ("first", "second", "tenth")


def test_what_is_learned_alone_need_not_be_a_question_of_the_task(tmp_path):
    talks = [{"prompt": f"Say {i}.", "completion": f"number {i}"} for i in range(50)]
    sums = [{"question": f"What is {i}?", "answers": [str(i)]} for i in range(200)]
    found = prepared(tmp_path, talks, sums, task={"kind": "label", "labels": [str(i) for i in range(200)]})
    assert len(found.splits["train"]) == 50
    assert any("learned as they stand" in line for line in found.lines())


def test_a_mixture_may_have_a_part_that_is_learned_alone(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i}.", "completion": f"{i}"}) + "\n" for i in range(60))
    )
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(graded(i)) + "\n" for i in range(300)))
    parts = [{"source": {"kind": "file", "path": str(tmp_path / f"{name}.jsonl")}} for name in ("chats", "sums")]
    data = {"source": {"kind": "mixture", "sources": parts}, "splits": SIZES}
    found = prepare(RunConfig.model_validate({"data": data, "objective": {"name": "sft"}, "penalties": []}))
    assert {record.strata["source"] for record in found.splits["train"]} == {"chats", "sums"}
    assert found.composition is not None


def test_a_system_turn_stands_before_the_examples():
    from calibtrain.data.prompts import Prompts

    shown = (Record((Message("user", "Where is Lyon?"),), chosen="France"),)
    template = Template("chat", tiny_tokenizer(), prompts=Prompts(examples=shown))
    record = Record((Message("system", "Be brief."), Message("user", "Where is Osaka?")))
    text = template.prompt_text(record)
    assert text.index("Be brief.") < text.index("Where is Lyon?") < text.index("Where is Osaka?")
    assert text.count("<|im_start|>system") == 1


def test_an_accent_written_as_one_character_or_as_two_is_one_question():
    for text in ("Where is Málaga?", "Où est le café ?", "한국의 수도는?", "Å"):
        composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        records = [Record((Message("system", text), Message("user", one)), one) for one in (composed, apart)]
        assert composed != apart
        assert len({one.key for one in records}) == len({one.id for one in records}) == 1
        assert len({one.taught for one in records}) == 1
        assert len({Record((), one).id for one in (composed, apart)}) == 1
    # Ids of composed text are those of earlier versions, also beside tools, and of text without a prompt.
    asked = (Message("user", "Where  is Málaga?"),)
    call = Message("assistant", "", (ToolCall("café", '{"n": "é"}'),))
    found = [
        Record(asked).id,
        Record(asked, tools='[{"name": "é"}]').id,
        Record((*asked, call, Message("tool", "Österreich"))).id,
        Record((), "Málaga").id,
        Record((Message("user", "What is 2?"),)).id,
    ]
    assert found == ["b8141304133e3479", "e5d373b90817b1e6", "27bc5ff2e81c9ea7", "bd14cb5373e5f3c5", "6caae914cda2b5da"]


def test_questions_in_two_unicode_forms_are_held_out_together(tmp_path):
    rows = [{"question": f"Où est le café {i} ?", "answers": [str(i)]} for i in range(300)]
    twins = [{**row, "question": unicodedata.normalize("NFD", row["question"])} for row in rows]
    found = prepared(tmp_path, rows + twins)
    held, trained = held_texts(found), trained_texts(found)
    assert len(held) == 40
    assert not {unicodedata.normalize("NFC", one) for one in held} & {
        unicodedata.normalize("NFC", one) for one in trained
    }

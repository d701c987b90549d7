"""The shapes that people's files have, one a row: read without a mapping, or refused with the mapping to write."""

import json
import re

import pytest
import yaml

from calibtrain.config import FileSource, RunConfig, SplitSizes
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.sources import load_records
from calibtrain.data.splits import split_of, split_records
from calibtrain.errors import UserError
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Message, Record, ToolCall

S, U, A = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = ToolCall("weather", '{"city": "Lyon"}')
RESULT = Message("tool", "18", name="weather", tool_call_id="c1")


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def shared(*turns):
    return [{"from": who, "value": text} for who, text in turns]


OPENAI_TOOLS = {
    "messages": [
        said("developer", "Be brief."),
        said("user", [{"type": "text", "text": "How is "}, {"type": "text", "text": "Lyon?"}]),
        said(
            "assistant",
            None,
            tool_calls=[{"id": "c1", "function": {"name": "weather", "arguments": '{"city":"Lyon"}'}}],
        ),
        said("tool", "18", tool_call_id="c1", name="weather"),
        said("assistant", "Mild."),
    ],
    "tools": [WEATHER],
}
SHAREGPT_TOOLS = {
    "conversations": shared(
        ("human", "How is Lyon?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Lyon"}}'),
        ("observation", "18"),
        ("gpt", "Mild."),
    ),
    "system": "Be brief.",
    "tools": json.dumps([WEATHER]),
}
PAIR = {
    "chosen": [said("user", "q"), said("assistant", "good")],
    "rejected": [said("user", "q"), said("assistant", "bad")],
}
SHAPES = {
    "graded question": (
        {"question": "q", "answers": ["a", "b"]},
        {"prompt": (U("q"),), "chosen": "a", "accepted": ("a", "b")},
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, {"prompt": (U("q"),), "chosen": "a"}),
    "TRL's conversational prompt and completion": (
        {"prompt": [said("system", "s"), said("user", "q")], "completion": [said("assistant", "a")]},
        {"prompt": (S("s"), U("q")), "chosen": "a"},
    ),
    "TRL's preference with an explicit prompt": (
        {"prompt": [said("user", "q")], "chosen": PAIR["chosen"][1:], "rejected": PAIR["rejected"][1:]},
        {"prompt": (U("q"),), "chosen": "good", "rejected": "bad"},
    ),
    "TRL's preference with an implicit prompt": (PAIR, {"prompt": (U("q"),), "chosen": "good", "rejected": "bad"}),
    "HH-RLHF's texts": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: Hi.\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: hi\n\nAssistant: Hi.\n\nHuman: q\n\nAssistant: bad",
        },
        {"prompt": (U("hi"), A("Hi."), U("q")), "chosen": "good", "rejected": "bad"},
    ),
    "TRL's unpaired preference": (
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": (U("q"),), "rejected": "a"},
    ),
    "TRL's language modelling": ({"text": "Once upon a time."}, {"prompt": (), "chosen": "Once upon a time."}),
    "Alpaca with system and history": (
        {"instruction": "Go", "input": "on", "output": "a", "system": "s", "history": [["q", "r"]]},
        {"prompt": (S("s"), U("q"), A("r"), U("Go\non")), "chosen": "a", "learned": (-3, -1)},
    ),
    "OpenAI's chat": (
        {
            "messages": [
                said("system", "s"),
                said("user", "q"),
                said("assistant", "r"),
                said("user", "p"),
                said("assistant", "a"),
            ]
        },
        {"prompt": (S("s"), U("q"), A("r"), U("p")), "chosen": "a", "learned": (-3, -1)},
    ),
    "OpenAI's chat with tools": (
        OPENAI_TOOLS,
        {
            "prompt": (
                *(S("Be brief."), U("How is Lyon?")),
                Message("assistant", "", (ToolCall("weather", '{"city": "Lyon"}', "c1"),)),
                RESULT,
            ),
            "chosen": "Mild.",
            "learned": (-3, -1),
            "tools": json.dumps([WEATHER]),
        },
    ),
    "a call of a tool as the answer": (
        {"messages": OPENAI_TOOLS["messages"][:3], "tools": [WEATHER]},
        {
            "prompt": (S("Be brief."), U("How is Lyon?")),
            "chosen": "",
            "calls": (ToolCall("weather", '{"city": "Lyon"}', "c1"),),
            "learned": (-1,),
            "tools": json.dumps([WEATHER]),
        },
    ),
    "messages that are not to be trained": (
        {
            "messages": [
                said("user", "q"),
                said("assistant", "r", weight=0),
                said("user", "p"),
                said("assistant", "a", weight=1),
            ]
        },
        {"prompt": (U("q"), A("r"), U("p")), "chosen": "a", "learned": (-1,)},
    ),
    "Axolotl's turns": (
        {
            "messages": [
                said("user", "q"),
                said("assistant", "a", train=True),
                said("user", "p"),
                said("assistant", "r", train=False),
            ]
        },
        {"prompt": (U("q"),), "chosen": "a", "learned": (-1,)},
    ),
    "ShareGPT": (
        {"conversations": shared(("system", "s"), ("human", "q"), ("gpt", "a"))},
        {"prompt": (S("s"), U("q")), "chosen": "a", "learned": (-1,)},
    ),
    "ShareGPT that opens with an answer": (
        {"conversation": shared(("gpt", "Hello!"), ("human", "q"), ("gpt", "a"))},
        {"prompt": (A("Hello!"), U("q")), "chosen": "a", "learned": (-1,)},
    ),
    "LLaMA-Factory's ShareGPT with tools": (
        SHAREGPT_TOOLS,
        {
            "prompt": (S("Be brief."), U("How is Lyon?"), Message("assistant", "", (CALL,)), Message("tool", "18")),
            "chosen": "Mild.",
            "learned": (-3, -1),
            "tools": json.dumps([WEATHER]),
        },
    ),
    "LLaMA-Factory's ranking": (
        {
            "conversations": shared(("human", "q")),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": (U("q"),), "chosen": "good", "rejected": "bad"},
    ),
    "LLaMA-Factory's KTO": (
        {"conversations": shared(("human", "q"), ("gpt", "a")), "kto_tag": False},
        {"prompt": (U("q"),), "rejected": "a"},
    ),
    "TRL's completion that calls a tool": (
        {
            "prompt": [said("user", "How is Lyon?")],
            "completion": OPENAI_TOOLS["messages"][2:],
            "tools": json.dumps([WEATHER]),
        },
        {
            "prompt": (
                U("How is Lyon?"),
                Message("assistant", "", (ToolCall("weather", '{"city": "Lyon"}', "c1"),)),
                RESULT,
            ),
            "chosen": "Mild.",
            "learned": (-3, -1),
            "tools": json.dumps([WEATHER]),
        },
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_read_without_a_mapping(tmp_path, name, suffix):
    row, expected = SHAPES[name]
    path = tmp_path / f"rows{suffix}"
    path.write_text(json.dumps([row] if suffix == ".json" else row), encoding="utf-8")
    labelled = bool({"label", "kto_tag"} & row.keys())
    [record] = load_records(FileSource(kind="file", path=path), labelled=labelled)
    assert record == Record(**expected, origin=record.origin)


@pytest.mark.parametrize(
    "name", ["OpenAI's chat", "ShareGPT", "LLaMA-Factory's ranking", "TRL's completion that calls a tool"]
)
def test_a_parquet_file_gives_the_same(tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, expected = SHAPES[name]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    [record] = load_records(FileSource(kind="file", path=tmp_path / "rows.parquet"))
    assert (record.prompt, record.chosen, record.learned) == (
        expected["prompt"],
        expected["chosen"],
        expected.get("learned", ()),
    )


def read(row, columns=(), **options):
    return record_from_row(row, find_layout(list(row), dict(columns), "rows", **options), "rows:1")


def test_columns_that_are_read_where_they_are_mapped():
    row = {
        "q": "q",
        "gold": "a",
        "w": "2.5",
        "key": 7,
        "passages": ["one", "two"],
        "weight": 80,
        "id": 1,
        "context": "x",
    }
    mapping = {"question": "q", "answers": "gold", "weight": "w", "id": "key", "context": "passages"}
    record = read(row, mapping)
    assert (record.weight, record.name, record.context) == (2.5, "7", ("one", "two"))
    plain = read(row, {"question": "q", "answers": "gold"})
    assert (plain.weight, plain.name, plain.context) == (1.0, "", ())
    for value in (-1, "much", float("inf"), True, [1], 10**400):
        with pytest.raises(UserError, match=r"rows:1: weight holds .*0 or more"):
            read({**row, "w": value}, mapping)
    with pytest.raises(UserError, match="rows:1: id holds"):
        read({**row, "key": [1]}, mapping)


UNKNOWN = {
    "another name for each": {"query": "Where?", "response": "There."},
    "a text with a class": {"text": "Where?", "label": "place"},
    "TRL's prompt alone with its solution": {"prompt": "Where?", "solution": "There."},
    "a conversation by another name": {"dialog": [said("user", "Where?"), said("assistant", "There.")]},
    "columns with spaces": {"Question": "Where?", "problem": "Where?", "ground_truth": "There."},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_shape_is_refused_with_the_mapping_to_write(name):
    row = UNKNOWN[name]
    with pytest.raises(UserError, match="accepted are question") as told:
        read(row)
    written = re.search(r"columns: \{.*\}", str(told.value))[0]
    record = read(row, yaml.safe_load(written)["columns"])
    assert (record.question, record.chosen) == (("Where?", "place") if "class" in name else ("Where?", "There."))


def test_columns_that_say_nothing_are_named_in_the_mapping():
    with pytest.raises(
        UserError, match=r"e\.g\. columns: \{question: your_column_of_questions, answers: your_column_of_a"
    ):
        find_layout(["x", "y"], {}, "rows")
    with pytest.raises(
        UserError, match=r"columns found are prompt; .*e\.g\. columns: \{answers: your_column_of_answers\}"
    ):
        find_layout(["prompt"], {}, "rows")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([said("user", [{"type": "image_url", "image_url": "x"}]), said("assistant", "a")], "a part that is no text"),
        (
            [said("user", "q"), said("assistant", "", tool_calls=[{"function": {"arguments": {}}}])],
            "each call in tool_calls",
        ),
        (
            [said("user", "q"), said("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])],
            "each call in tool_calls",
        ),
        ([said("user", "q", tool_calls=[{"name": "f"}]), said("assistant", "a")], "only the assistant calls tools"),
        (shared(("human", "q"), ("function_call", "f(x)"), ("gpt", "a")), "function_call of messages is no JSON"),
        (shared(("robot", "q"), ("gpt", "a")), "each message of messages is"),
        ([said("user", "q"), said("assistant", None)], "each message of messages is"),
        ([said("user", "q"), said("assistant", "a", weight=0)], "none that is trained"),
    ],
)
def test_messages_that_cannot_be_read(turns, message):
    with pytest.raises(UserError, match=f"rows:1: .*{message}"):
        read({"messages": turns})


@pytest.mark.parametrize(
    ("tools", "message"), [("{", "no JSON"), ("3", "list of tool definitions"), ([1], "list of tool")]
)
def test_tools_that_cannot_be_read(tools, message):
    with pytest.raises(UserError, match=f"rows:1: tools .*{message}"):
        read({"messages": OPENAI_TOOLS["messages"], "tools": tools})
    assert read({"question": "q", "answers": "a", "tools": "a hammer"}).tools == ""  # some other column


def test_pairs_and_labels_are_of_text():
    call = OPENAI_TOOLS["messages"][2]
    row = {"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [call]}
    with pytest.raises(UserError, match="rejected answer calls a tool"):
        read(row)
    with pytest.raises(UserError, match="chosen answer calls a tool"):
        read({**row, "chosen": [call], "rejected": row["chosen"]})


def test_calls_and_tools_tell_questions_apart():
    row = {"messages": OPENAI_TOOLS["messages"], "tools": [WEATHER]}
    plain, other = read({"messages": row["messages"]}), read({"messages": row["messages"][:2] + row["messages"][3:]})
    assert len({read(row).id, plain.id, other.id}) == 3
    assert read(row).question == "How is Lyon?"
    # What has neither keeps the id that it always had.
    assert Record((U("Where is Lyon?"),)).id == "68d55487615482c9"


def test_a_question_of_an_earlier_turn_is_held_out_too():
    held_out = next(f"q{i}" for i in range(1000) if split_of(Record((U(f"q{i}"),)).id, 0, ALL) == "test")
    opening = [said("user", held_out), said("assistant", "a")]
    rows = [{"messages": [*opening, said("user", f"p{i}"), said("assistant", "b")]} for i in range(40)]
    free = [{"messages": [said("user", f"x{i}"), said("assistant", "a")]} for i in range(40)]
    records = [read(row) for row in rows + free] + [read({"question": held_out, "answers": "a"})]
    sizes = SplitSizes(train=None, calibration=0, temperature=0, certification=0, test=1)
    splits = split_records(records, sizes, 0)
    assert [record.question for record in splits["test"]] == [held_out]
    assert splits["train"]
    assert not any(held_out in (turn.content for turn in record.prompt) for record in splits["train"])


ALL = ("train", "calibration", "temperature", "certification", "test")


def test_weights_that_the_objective_would_pass_over_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "good", "rejected": "bad", "completion": "good", "w": 2}\n')
    sizes = dict.fromkeys(ALL[1:], 0)
    source = {"kind": "file", "path": str(path), "columns": {"weight": "w"}}
    settings = {"data": {"source": source, "splits": sizes}, "penalties": []}
    weighed = prepare(RunConfig(**settings, objective={"name": "sft"}))
    assert [record.weight for record in weighed.splits["train"]] == [2.0]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: weight 2, and objective\.name: orpo does not weigh"):
        prepare(RunConfig(**settings, objective={"name": "orpo"}))

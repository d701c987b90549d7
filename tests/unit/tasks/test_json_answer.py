"""JSON and tool calls: what is read, what is right, and what is refused before long work starts."""

import json
import math

import pytest
import torch

from calibtrain.confidence.generation import Generation
from calibtrain.confidence.likelihood import graded_answers
from calibtrain.config import EvaluationConfig, RunConfig
from calibtrain.config_file import load_config
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of
from tests.tiny import tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "size": {"type": "number"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
        "stops": {"type": "array", "items": {"type": "object"}},
        "open": {"type": ["boolean", "null"]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 20}},
}


def task(**keys):
    keys = {"schema": SCHEMA, **keys} if not keys.get("tool") else keys
    return task_of(RunConfig(task={"kind": "json", **keys}).task)


def record(*accepted, **fields):
    texts = tuple(one if isinstance(one, str) else json.dumps(one) for one in accepted)
    return Record((Message("user", "Which?"),), accepted=texts, fields=fields, origin="rows.jsonl:3")


def graded(task, reply, gold):
    """Whether the whole is right, and every part by its name."""
    reading = task.read(reply, gold)
    (grade,) = task.grades([reading], [gold])
    assert all(reply[one.start : one.stop] == reading.text[one.start - reading.start : one.stop - reading.start]
               for one in reading.parts)  # fmt: skip
    return grade.correct, dict(zip([one.name for one in reading.parts], grade.parts, strict=True))


GOLD = {"city": "Zürich", "size": 12, "tags": ["a", "b"]}


@pytest.mark.parametrize(
    ("said", "whole", "parts"),
    [
        ({"city": "zurich", "size": 12.0, "tags": ["A", "b"]}, True, [True, True, True, True]),
        ({"size": 12, "tags": ["a", "b"], "city": "Z\u00fcrich"}, True, [True] * 4),
        ({"city": "Bern", "size": 12, "tags": ["a", "b"]}, False, [False, True, True, True]),
        ({"city": "Zürich", "size": 12, "tags": ["b", "a"]}, False, [True, True, False, False]),
        ({"city": "Zürich", "size": 12, "tags": ["a"]}, False, [True, True, True]),
        ({"city": "Zürich", "size": 12, "tags": ["a", "b", "c"]}, False, [True, True, True, True, False]),
        ({"city": "Zürich", "size": 12, "tags": []}, False, [True, True, False]),
        ({"city": "Zürich", "size": 12}, False, [True, True]),
        ({"city": "Zürich", "size": 12, "tags": ["a", "b"], "open": None}, False, [True, True, True, True, False]),
        ({"city": "Zürich", "size": "12", "tags": ["a", "b"]}, False, [True, False, True, True]),
        ({"city": "Zürich", "size": True, "tags": "a"}, False, [True, False, False]),
    ],
)
def test_the_whole_and_its_parts(said, whole, parts):
    correct, found = graded(task(), json.dumps(said), record(GOLD))
    assert (correct, list(found.values())) == (whole, parts)


def test_of_several_accepted_answers_the_nearest_grades_the_parts():
    gold = record({"city": "Bern", "size": 1}, GOLD)
    assert graded(task(), json.dumps({"city": "Bern", "size": 1}), gold)[0]
    assert graded(task(), json.dumps({**GOLD, "city": "Bern"}), gold) == (
        False, {"city": False, "size": True, "tags[0]": True, "tags[1]": True},
    )  # fmt: skip


def test_arrays_without_an_order():
    one = task(unordered=["tags", "stops"])
    stops = [{"name": "Lyon", "at": 3}, {"name": "Nice", "at": 4}]
    gold = record({**GOLD, "stops": stops})
    assert graded(one, json.dumps({**GOLD, "tags": ["b", "a"], "stops": stops[::-1]}), gold)[0]
    correct, parts = graded(one, json.dumps({**GOLD, "tags": ["b", "b"], "stops": [{"name": "Nice", "at": 5}]}), gold)
    assert not correct
    assert parts == {"city": True, "size": True, "tags[0]": True, "tags[1]": False,
                     "stops[0].name": True, "stops[0].at": False}  # fmt: skip
    numbers = task_of(RunConfig(task={"kind": "json", "schema": {}, "unordered": ["n"]}).task)
    assert graded(numbers, '{"n": [1e18, 2, 1.0]}', record({"n": [1, 2.0, 10**18]}))[0]


def test_fields_that_do_not_count_have_no_grade():
    one = task(compare=["city", "stops[].name"])
    gold = record({"city": "Bern", "size": 3, "stops": [{"name": "Lyon", "at": 3}]})
    said = {"city": "Bern", "size": 4, "stops": [{"at": 9, "name": "Lyon"}]}
    assert graded(one, json.dumps(said), gold) == (
        True, {"city": True, "size": None, "stops[0].at": None, "stops[0].name": True},
    )  # fmt: skip
    assert not graded(one, json.dumps({**said, "stops": []}), gold)[0]
    assert one.key(json.dumps(said), gold) == one.key(gold.accepted[0], gold)


@pytest.mark.parametrize(
    ("reply", "found", "correct"),
    [
        ('It is {"city": "Bern"}.', True, True),
        ('```json\n{"city": "Bern"}\n```', True, True),
        ('{"city": "Bern", "city": "Bern"}', False, False),
        ('{"city": "Bern"', False, False),
        ("Bern", False, False),
        ("", False, False),
        ('{"town": "Bern"}', False, False),  # violates the schema
        ('["Bern"]', False, False),
        ("[" * 50_000, False, False),
    ],
)
def test_what_is_found_in_a_reply(reply, found, correct):
    gold = record({"city": "Bern"})
    assert task().read(reply, gold).found == found
    assert graded(task(), reply, gold)[0] == correct
    assert task().read(reply, Record(gold.prompt)).found == found


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                       "required": ["city"]},
    },
}  # fmt: skip
CALL = {"name": "weather", "arguments": {"city": "Bern", "days": 3}}


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(CALL),
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        f"I look it up.\n<tool_call>{json.dumps(CALL)}",
        json.dumps({"id": "call_1", "type": "function", "function": CALL}),
        json.dumps({"name": "weather", "arguments": json.dumps(CALL["arguments"])}),
    ],
)
@pytest.mark.parametrize("tools", [None, [WEATHER], json.dumps([WEATHER["function"]])])
def test_a_tool_call_is_read_in_every_form(reply, tools):
    one, gold = task(tool=True), record(CALL, **({} if tools is None else {"tools": tools}))
    correct, parts = graded(one, reply, gold)
    assert correct
    assert set(parts) in ({"name", "arguments.city", "arguments.days"}, {"name", "arguments"})
    assert all(parts.values())
    correct, parts = graded(one, reply.replace("Bern", "Rome"), gold)
    assert (correct, parts.pop("name")) == (False, True)
    assert False in parts.values()
    assert one.asked(record(reply if reply.startswith(("{", "<")) else CALL)).accepted


def test_a_call_that_no_tool_takes_cannot_serve():
    one, gold = task(tool=True), record(CALL, tools=[WEATHER])
    for wrong in ({**CALL, "name": "whether"}, {"name": "weather", "arguments": {"days": 3}}, {"name": "weather"}):
        assert not one.read(json.dumps(wrong), gold).found
    assert not one.read(f"<tool_call>{json.dumps(CALL)}</tool_call>" * 2, gold).found
    with pytest.raises(UserError, match=r"rows.jsonl:3.*no tool 'whether'"):
        one.asked(record({**CALL, "name": "whether"}, tools=[WEATHER]))
    with pytest.raises(UserError, match=r"rows.jsonl:3: tools.*definitions|rows.jsonl:3: tools: a tool is"):
        one.asked(record(CALL, tools=[3]))
    with pytest.raises(UserError, match=r"tool 'a': no JSON Schema"):
        one.asked(record(CALL, tools=[{"name": "a", "parameters": {"type": "text"}}]))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "text"}, "no JSON Schema"),
        ({"$ref": "http://example.org/x.json"}, "nothing is fetched"),
        ({"properties": {"a": {"$ref": "other.json#/a"}}}, "nothing is fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, "not in it"),
        ({"properties": {"a": {"pattern": "("}}}, "no JSON Schema"),
    ],
)
def test_schemas_that_are_none(schema, message):
    with pytest.raises(UserError, match=rf"task.schema.*{message}"):
        task(schema=schema)


def test_a_reference_without_end_is_a_violation():
    assert not task(schema={"$ref": "#"}).read("{}", record()).found


def test_configs_that_are_mistaken(tmp_path):
    def error(*keys):
        path = tmp_path / "run.yaml"
        path.write_text("task: {kind: json, " + ", ".join(keys) + "}\n")
        with pytest.raises(UserError) as caught:
            task_of(load_config(path).task)
        return str(caught.value)

    assert "needs a schema" in error("match: exact_match")
    assert "exclude each other" in error("schema: {}", "schema_file: s.json")
    assert f"{tmp_path / 's.json'}: cannot be read" in error("schema_file: s.json")
    (tmp_path / "s.json").write_text("{")
    assert "cannot be read as JSON" in error("schema_file: s.json")
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    assert "'town': no such field; the fields are city" in error("schema_file: s.json", "compare: [town]")
    assert "no such field" in error("tool: true", "unordered: [town]")
    path = tmp_path / "run.yaml"
    path.write_text("task: {kind: json, schema_file: s.json}\n")
    config = load_config(path)
    assert config.evaluation.max_new_tokens == 128
    assert RunConfig.model_validate(config.resolved()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("Bern", "is no JSON"), ('{"city": 3}', "violates the schema"), ('{"city": "a", "city": "b"}', "twice")],
)
def test_gold_answers_that_cannot_be_are_named(text, message):
    with pytest.raises(UserError, match=rf"rows.jsonl:3: the accepted answer.*{message}"):
        task().asked(record(text))
    with pytest.raises(UserError, match=rf"rows.jsonl:3: the answer to learn.*{message}"):
        task().asked(Record((Message("user", "?"),), chosen=text, origin="rows.jsonl:3"))


def test_a_reply_to_learn_is_what_is_accepted():
    asked = task().asked(Record((Message("user", "?"),), chosen='{"city": "Bern"}'))
    assert asked.accepted == ('{"city": "Bern"}',)
    assert task().asked(asked) == asked


def test_the_likelihood_is_that_of_the_values():
    template = Template("chat", tiny_tokenizer(), task=task())
    text = 'So: {"city": "Bern", "size": 12, "tags": []}'
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"] + [template.end_id]
    made = Generation(tuple(ids), tuple(-0.01 * 2**i for i in range(len(ids))), torch.zeros(len(ids), 2), True)
    (answer,) = graded_answers([record(GOLD)], [made], template, EvaluationConfig()).answers
    said = read_reply(template, ids, record(GOLD))
    pieces = template.token_texts(ids)
    read = "".join(pieces[i] for i in said.read)
    # Tokens may hold a character of what stands before, and nothing of the keys.
    assert "city" not in read
    for value in ('Bern"', "12,", "[]"):
        assert value in read
    assert answer.logprob == math.fsum(made.logprobs[i] for i in said.read)
    assert answer.reply_logprob == math.fsum(made.logprobs)
    assert answer.text == text[4:]
    assert [answer.text[one.start : one.stop] for one in answer.parts] == ['"Bern"', "12", "[]"]
    assert [one.text for one in answer.parts] == ["Bern", "12", "[]"]
    both = [set(range(*span)) for span in said.parts]
    assert set().union(*both) == set(said.read)
    assert type(answer).from_dict(json.loads(json.dumps(answer.as_dict()))) == answer

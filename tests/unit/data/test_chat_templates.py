"""Every turn of a conversation is learned behind the prompt that it is asked with, under the templates of known models."""

import json
from dataclasses import replace

import pytest

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_records
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.templates import Template
from calibtrain.data.turns import IGNORED, learned_sequences
from calibtrain.errors import UserError
from tests.chat_families import ENDS, SYSTEM, THOUGHT, TOKENS, TURNS, family_tokenizer
from tests.tiny import tiny_tokenizer

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}
CALLED = [
    {"role": "user", "content": "How is Lyon?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "18", "name": "weather", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Mild."},
]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record_of(turns, **row):
    row = {"messages": turns, **row}
    return record_from_row(row, find_layout(list(row), {}, "rows"), "rows:1")


def asked(record, place):
    turns = record.turns
    return replace(record, prompt=turns[:place], chosen=turns[place].content, calls=turns[place].tool_calls)


def spans(labels):
    """(start, stop) of each run of labels."""
    on = [label != IGNORED for label in labels] + [False]
    edges = [i for i in range(len(on)) if on[i] != (i > 0 and on[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def taught(record, template):
    """[(prompt ids, learned text)] of every run of labels, in all sequences."""
    found = []
    for one in learned_sequences(record, template):
        assert len(one.ids) == len(one.labels)
        found += [
            (one.ids[:start], template.tokenizer.decode(one.labels[start:stop])) for start, stop in spans(one.labels)
        ]
    return found


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", TOKENS)
def test_each_turn_is_learned_behind_the_prompt_that_it_is_asked_with(name, system):
    template = Template("chat", family_tokenizer(name))
    record = record_of([SYSTEM, *TURNS] if system else TURNS)
    assert template.tokenizer.decode([template.end_id]) == ENDS.get(name, TOKENS[name][1])
    lead = " " if name == "mistral" else ""
    assert taught(record, template) == [
        (
            template.prompt_ids(asked(record, place)),
            lead + record.turns[place].content + template.tokenizer.decode([template.end_id]),
        )
        for place in (-5, -3, -1)
    ]
    # Mistral puts the system text before the last question alone: no earlier prompt is the beginning of a later one.
    sequences = learned_sequences(record, template)
    assert len(sequences) == (3 if (name, system) == ("mistral", True) else 1)
    if len(sequences) == 1:
        assert template.departure(replace(record, prompt=TOLD)) is None or name == "qwen3"
        whole = template.tokenizer.apply_chat_template(rendered(record), tokenize=True)["input_ids"]
        assert whole[: len(sequences[0].ids)] == sequences[0].ids or name == "qwen3"


TOLD = record_of(TURNS[:2]).prompt


def rendered(record):
    return [{"role": turn.role, "content": turn.content} for turn in record.turns]


def test_thinking_that_a_template_takes_out_again_is_learned_where_it_stands():
    template = Template("chat", family_tokenizer("qwen3"))
    record = record_of(THOUGHT)
    sequences = learned_sequences(record, template)
    assert len(sequences) == 3
    assert taught(record, template) == [
        (template.prompt_ids(asked(record, place)), record.turns[place].content + "<|im_end|>")
        for place in (-5, -3, -1)
    ]
    # Behind a question, no thought of an earlier answer stands: it is read as it will be asked.
    assert [template.tokenizer.decode(one.ids).count("Hm.") for one in sequences] == [1, 1, 1]
    silent = Template("chat", family_tokenizer("qwen3"), {"enable_thinking": False})
    assert [len(one) for one in (learned_sequences(record_of(TURNS), silent),)] == [3]
    llama = Template("chat", family_tokenizer("llama3"))
    assert len(learned_sequences(record, llama)) == 1


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_calls_of_tools_are_learned_and_their_results_are_read(name):
    template = Template("chat", family_tokenizer(name))
    record = record_of(CALLED, tools=[WEATHER])
    end = template.tokenizer.decode([template.end_id])
    call = {
        "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>',
        "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Lyon"}, "id": "call00001"}]',
    }[name]
    found = taught(record, template)
    # Qwen's template opens a last turn with an empty block of thinking, which it leaves out once the result is there.
    assert [text.removeprefix("<think>\n\n</think>\n\n") for _, text in found] == [
        call + end,
        (" " if name == "mistral" else "") + "Mild." + end,
    ]
    assert [ids for ids, _ in found] == [template.prompt_ids(asked(record, place)) for place in (-3, -1)]
    assert "Now." in template.tokenizer.decode(found[0][0])
    assert "18" in template.tokenizer.decode(found[1][0])
    ending = record_of(CALLED[:2], tools=json.dumps([WEATHER]))
    [[only]] = encode_records([ending], template, 2000, pairs=False, drops=DropReport(), every_turn=False)
    assert template.tokenizer.decode(only.ids).endswith(call + end)


def test_templates_that_pass_over_tools_are_told():
    for name, row, told in [
        ("llama3", {"tools": [WEATHER]}, "rows:1: .*no place for the definitions of tools"),
        ("llama3", {}, "rows:1: .*writes no tool calls"),
        ("phi", {}, "rows:1: .*writes no tool calls"),
        ("plain", {}, "rows:1: .*plain cannot write tools.*template: chat"),
    ]:
        template = Template("plain", tiny_tokenizer()) if name == "plain" else Template("chat", family_tokenizer(name))
        with pytest.raises(UserError, match=told):
            encode_records([record_of(CALLED, **row)], template, 2000, pairs=False, drops=DropReport(strict=True))
    result = record_of([CALLED[0], {"role": "assistant", "content": "I look."}, *CALLED[2:]])
    with pytest.raises(UserError, match=r"rows:1: .*leaves the results of tools out"):
        encode_records(
            [result], Template("chat", family_tokenizer("phi")), 2000, pairs=False, drops=DropReport(strict=True)
        )


def test_what_a_template_says_of_a_call_names_the_row():
    nameless = [CALLED[0], {**CALLED[1], "tool_calls": [{"function": CALL["function"]}]}, *CALLED[2:]]
    with pytest.raises(
        UserError, match=r"rows:1: .*the chat template refuses the conversation: Tool call IDs should be"
    ):
        encode_records(
            [record_of(nameless)],
            Template("chat", family_tokenizer("mistral")),
            2000,
            pairs=False,
            drops=DropReport(strict=True),
        )


def test_plain_teaches_each_answer_and_its_end():
    template = Template("plain", tiny_tokenizer())
    record = record_of([SYSTEM, *TURNS])
    eos = template.tokenizer.eos_token
    assert taught(record, template) == [
        (template.prompt_ids(asked(record, place)), f" {record.turns[place].content}{eos}") for place in (-5, -3, -1)
    ]
    [one] = learned_sequences(record, template)
    # Where the answer ends the end is learned, and the blank line is read.
    assert template.tokenizer.decode(one.ids) == template.prompt_text(record) + " Australia" + eos
    assert one.labels.count(template.end_id) == 3
    assert one.ids.count(template.end_id) == 1


def test_a_tokenizer_that_merges_across_turns_gets_a_sequence_a_turn():
    template = Template("plain", tiny_tokenizer(split_words=False))
    turns = [
        *({"role": "user", "content": "Q"}, {"role": "assistant", "content": "Answer: France"}),
        *({"role": "user", "content": "R"}, {"role": "assistant", "content": "Japan"}),
    ]
    record = record_of(turns)
    assert [ids for ids, _ in taught(record, template)] == [
        template.prompt_ids(asked(record, place)) for place in (-3, -1)
    ]


def test_whitespace_that_a_template_takes_away_does_not_break_a_conversation_in_two():
    template = Template("chat", family_tokenizer("llama3"))
    turns = [dict(turn, content=f" {turn['content']}\n") for turn in TURNS]
    record = record_of(turns)
    assert len(learned_sequences(record, template)) == 1
    texts = [text for _, text in taught(record, template)]
    # Earlier turns as the template writes them, the last one as it stands.
    assert texts == ["France.<|eot_id|>", "In Japan,\n\nof course.<|eot_id|>", " Australia\n<|eot_id|>"]


def test_the_marks_of_a_template_say_what_is_learned():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    template = Template("chat", tokenizer)
    record = record_of([SYSTEM, *TURNS])
    [one] = learned_sequences(record, template)
    assert one.ids == tokenizer.apply_chat_template(rendered(record), tokenize=True)["input_ids"][: len(one.ids)]
    assert [text for _, text in taught(record, template)] == [
        f"{turn['content']}<|im_end|>" for turn in TURNS if turn["role"] == "assistant"
    ]
    # Marks that leave the end out: an answer that never ends is no answer.
    tokenizer.chat_template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert taught(record, Template("chat", tokenizer)) == taught(record, template)
    # Marks around more than is generated say so.
    tokenizer.chat_template = MARKED.replace("<|im_end|>{% endgeneration %}\n", "<|im_end|>\n{% endgeneration %}")
    assert taught(record, Template("chat", tokenizer))[0][1] == "France.<|im_end|>\n"
    # A turn that is not to be learned: the marks know nothing of it.
    quiet = record_of([*TURNS[:1], {**TURNS[1], "weight": 0}, *TURNS[2:]])
    tokenizer.chat_template = MARKED
    assert [text for _, text in taught(quiet, Template("chat", tokenizer))] == [
        f"{TURNS[i]['content']}<|im_end|>" for i in (3, 5)
    ]


def test_a_conversation_is_cut_from_its_left_at_whole_answers():
    template = Template("chat", family_tokenizer("llama3"))
    record = record_of(TURNS)
    [whole] = learned_sequences(record, template)
    starts = [start for start, _ in spans(whole.labels)]
    lengths = [len(whole.ids) - start for start in starts]
    for room, kept in [
        (len(whole.ids), 3),
        (lengths[0] + 1, 3),
        (lengths[0], 2),
        (lengths[1] + 1, 2),
        (lengths[1], 1),
        (lengths[2] + 1, 1),
    ]:
        drops = DropReport(strict=True)
        [[one]] = encode_records([record], template, room, pairs=False, drops=drops)
        assert len(one.ids) == room
        assert list(one.ids[-lengths[3 - kept] :]) == whole.ids[-lengths[3 - kept] :]
        assert one.completion_start == room - lengths[3 - kept]
        assert one.answer_length == lengths[2]
        assert drops.shortened == (room < len(whole.ids))
    drops = DropReport(strict=True)
    with pytest.raises(UserError, match="the answer alone fills max_length"):
        encode_records([record], template, lengths[2], pairs=False, drops=drops)


def test_the_last_turn_alone_where_asked():
    template = Template("chat", family_tokenizer("llama3"))
    record = record_of(TURNS)
    [[last]] = encode_records([record], template, 512, pairs=False, drops=DropReport(strict=True), every_turn=False)
    [[every]] = encode_records([record], template, 512, pairs=False, drops=DropReport(strict=True))
    assert last.ids == every.ids
    assert (last.labels, last.completion_length) == ((), len(template.completion_ids("Australia")))
    assert every.completion_length == sum(
        len(template.completion_ids(turn["content"])) for turn in TURNS if turn["role"] == "assistant"
    )
    [[pair]] = [encode_records([record], template, 512, pairs=False, unpaired=True, drops=DropReport(strict=True))]
    assert pair[0].labels == ()


def test_whitespace_that_a_template_writes_before_an_answer_is_learned_with_it():
    template = Template("chat", family_tokenizer("mistral"))
    record = replace(record_of(TURNS), learned=())
    [[one]] = encode_records([record], template, 512, pairs=False, drops=DropReport(strict=True))
    whole = template.tokenizer.apply_chat_template(rendered(record), tokenize=True)["input_ids"]
    assert (list(one.ids), one.completion_start) == (whole, len(template.prompt_ids(record)))
    assert template.decode_answer(one.ids[one.completion_start :]) == "Australia"
    assert template.departure(record) is None
    assert template.completion_ids("  Australia")[:1] != template.completion_ids("Australia")[:1]


def test_a_text_is_learned_as_it_stands_in_pieces():
    template = Template("plain", tiny_tokenizer(add_bos=True))
    record = record_from_row({"text": "The quick brown fox."}, find_layout(["text"], {}, "rows"), "rows:1")
    [[one]] = encode_records([record], template, 512, pairs=False, drops=DropReport(strict=True))
    assert template.tokenizer.decode(one.ids) == "<|bos|>The quick brown fox.<|im_end|>"
    assert (one.completion_start, one.labels) == (1, ())
    [pieces] = encode_records([record], template, 5, pairs=False, drops=DropReport(strict=True))
    assert all(len(piece.ids) <= 5 for piece in pieces)
    assert [id for piece in pieces for id in piece.ids[1:]] == list(one.ids[1:])
    assert {piece.completion_start for piece in pieces} == {1}

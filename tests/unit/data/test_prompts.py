import json

import pytest

from calibtrain.config import FileSource, RunConfig
from calibtrain.config_data import DataConfig
from calibtrain.config_file import dump_config, load_config
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_answer, encode_records
from calibtrain.data.prompts import Prompts, prompts_of
from calibtrain.data.sources import load_records
from calibtrain.data.templates import Template, template_of
from calibtrain.errors import UserError
from calibtrain.pipeline.check import check
from calibtrain.pipeline.prepare import prepare, with_examples
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer, write_tiny_model

QUESTION = Record((Message("user", "Where is Lyon?"),), chosen="France", accepted=("France",))
SHOT = Record((Message("user", "Where is Osaka?"),), chosen="Japan")


def template(kind="plain", **parts):
    return Template(kind, tiny_tokenizer(), prompts=Prompts(whole=kind == "jinja", **parts))


def own(source, kind="jinja", **parts):
    return template(kind, source=source, **parts)


def test_plain_with_all_parts():
    record = Record(QUESTION.prompt, context=("Lyon is French.", "It is old."))
    text = template(system="Be brief.", examples=(SHOT,)).prompt_text(record)
    assert text == (
        "Be brief.\n\nQuestion: Where is Osaka?\nAnswer: Japan\n\n"
        "Context: Lyon is French.\n\nIt is old.\nQuestion: Where is Lyon?\nAnswer:"
    )


def test_chat_with_all_parts():
    own = Record((Message("system", "Say a country."), *QUESTION.prompt), context=("Lyon is French.",))
    text = template("chat", system="Be brief.", examples=(SHOT,)).prompt_text(own)
    assert text == (
        "<|im_start|>system\nBe brief.\n\nSay a country.<|im_end|>\n"
        "<|im_start|>user\nWhere is Osaka?<|im_end|>\n<|im_start|>assistant\nJapan<|im_end|>\n"
        "<|im_start|>user\nContext: Lyon is French.\n\nWhere is Lyon?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_row_brings_is_never_left_out_in_silence():
    passages = Record(QUESTION.prompt, context=("Lyon is French.",), origin="rows:3")
    with pytest.raises(UserError, match=r"rows:3: .* the row has passages .* write \{\{ context \}\}"):
        own("Q: {{ question }} A:").prompt_text(passages)
    with pytest.raises(UserError, match="the row has passages"):
        own("Q: {{ question }}", "chat").prompt_text(passages)
    for turn in (Message("system", "Say a country."), Message("user", "Hello.")):
        talk = Record((turn, *QUESTION.prompt), origin="rows:4")
        with pytest.raises(UserError, match=r"rows:4: .* the row has turns before the question .* messages"):
            own("Q: {{ question }} A:").prompt_text(talk)
        assert turn.content in own("Q: {{ question }}", "chat").prompt_text(talk)
        shown = own("{% for one in messages %}{{ one.content }} {% endfor %}{{ question }}").prompt_text(talk)
        assert shown == f"{turn.content} Where is Lyon?"


def test_a_template_of_the_users_own_makes_the_whole_prompt():
    source = (
        "{{ system }}\n{% for one in examples %}Q: {{ one.question }} A: {{ one.answer }}\n{% endfor %}"
        "{% for one in context %}[{{ loop.index }}] {{ one }}\n{% endfor %}Q: {{ question }} "
        "({{ options | join('/') }}, {{ fields.topic }}) A:"
    )
    record = Record(QUESTION.prompt, context=("French.",), options=("a", "b"), fields={"topic": "geo"})
    one = own(source, system="Be brief.", examples=(SHOT,))
    text = "Be brief.\nQ: Where is Osaka? A: Japan\n[1] French.\nQ: Where is Lyon? (a/b, geo) A:"
    assert one.prompt_text(record) == text
    assert one.tokenizer.decode(one.prompt_ids(record) + one.completion_ids("France")[:-1]) == text + " France"
    assert one.stops == ("\n",)
    spaced = own("Q: {{ question }} {{ fields.topic }}\nA: ")  # the space is the template's
    assert spaced.tokenizer.decode(spaced.completion_ids("France")[:-1]) == "France"


def test_in_chat_it_makes_the_users_turn():
    one = own("{{ question }} ({{ fields.topic }})", "chat", system="Be brief.")
    assert "<|im_start|>user\nWhere is Lyon? (geo)<|im_end|>" in one.prompt_text(
        Record(QUESTION.prompt, fields={"topic": "geo"})
    )
    assert one.prompt_text(Record(QUESTION.prompt, fields={"topic": "geo"})).startswith("<|im_start|>system\nBe brief.")


def test_shots_stand_before_a_template_that_shows_none():
    assert own("Q: {{ question }}\nA:").prompt_text(QUESTION, [SHOT]) == (
        "Q: Where is Osaka?\nA: Japan\n\nQ: Where is Lyon?\nA:"
    )


@pytest.mark.parametrize(
    ("source", "parts", "words"),
    [
        ("{{ question", {}, r"prompt_template, line 1"),
        ("{{ question }} {{ topic }}", {}, r"reads topic; there are question, context.*fields\.NAME"),
        ("{{ system }}", {"system": "x"}, r"does not show it: write \{\{ question \}\}"),
        ("{{ question }}", {"system": "x"}, r"data\.system: the prompt template does not show it"),
        ("{{ question }}", {"examples": (SHOT,)}, r"data\.few_shot: the prompt template does not show it"),
    ],
)
def test_templates_that_cannot_serve(source, parts, words):
    with pytest.raises(UserError, match=words):
        Prompts(source=source, whole=True, **parts).check()


@pytest.mark.parametrize(
    "source",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ fields.topic }} {{ question }}",
        "{{ 1 / 0 }} {{ question }}",
        "{{ fields.update({'a': 1}) }} {{ question }}",
        "{% for i in range(999999999) %}{% endfor %}{{ question }}",
    ],
)
def test_what_a_template_may_not_do_names_the_row(source):
    with pytest.raises(UserError, match=r"rows:3: data\.prompt_template: "):
        Prompts(source=source).rendered(Record(QUESTION.prompt, origin="rows:3"))


def test_each_part_is_in_the_hash_and_nothing_leaves_it_as_it_was():
    bare = Template("plain", tiny_tokenizer()).hash
    assert template().hash == bare
    # As they were before any of this could be set.
    assert bare == "b267043a8bfd02bc14afba079c6f2b89d00ec6cc3d5a9994157217826f586240"
    assert template("chat").hash == "d9d63962fe71333145f8358d73323bd4db6436a231e9d43460e31756e05103b6"
    hashes = {
        bare,
        template(system="x").hash,
        template(system="y").hash,
        template(examples=(SHOT,)).hash,
        own("{{ question }}").hash,
        own("{{ question }}?").hash,
    }
    assert len(hashes) == 6


def test_the_context_is_cut_before_the_question():
    passages = tuple(f"Passage {i} tells of the quick brown fox and the lazy dog." for i in range(4))
    record = Record(QUESTION.prompt, chosen="France", context=passages, origin="r:1")
    one, drops = template(), DropReport()
    whole = len(one.prompt_ids(record))
    for length in (whole + 9, whole - 10, whole // 2, 30):
        [(example,)] = encode_records([record], one, length, False, drops)
        assert len(example.ids) <= length
        text = one.tokenizer.decode(example.ids)
        assert "Question: Where is Lyon?\nAnswer: France" in text
        assert text.startswith("Context: Passage 0") or length == 30
    assert drops.shortened == 3
    told = encode_answer(record, "France", True, one, whole // 2, 0)
    assert one.tokenizer.decode(told.ids).startswith("Context: Passage 0 tells")
    # What is asked later is cut as it was in training.
    fitted = Template("plain", tiny_tokenizer(), prompts=Prompts(room=whole // 2))
    assert len(fitted.prompt_ids(record)) <= whole // 2
    assert fitted.fitted(record).context[0] == passages[0]
    assert fitted.fitted(QUESTION) is QUESTION


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("named", ["passages", ["passages"], ["first", "second"]])
def test_columns_of_context(tmp_path, named):
    row = {
        "question": "q",
        "answers": "a",
        "passages": ["One.", "Two."],
        "first": "One.",
        "second": "Two.",
        "context": "no",
    }
    [record] = load_records(
        FileSource(kind="file", path=write(tmp_path / "c.jsonl", [row]), columns={"context": named})
    )
    assert record.context == ("One.", "Two.")
    row["passages"] = row["first"] = 3
    with pytest.raises(UserError, match=r"c\.jsonl:1: column .* holds 3; a context is text"):
        load_records(FileSource(kind="file", path=write(tmp_path / "c.jsonl", [row]), columns={"context": named}))
    with pytest.raises(UserError, match=r"columns\.context names 'none'"):
        load_records(FileSource(kind="file", path=tmp_path / "c.jsonl", columns={"context": "none"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    write_tiny_model(path / "tiny")
    write(path / "rows.jsonl", [{"question": f"What is {i}?", "answers": [f"{i}"]} for i in range(80)])
    return path


def config(folder, **data):
    sizes = {"train": 20, "calibration": 3, "temperature": 3, "certification": 4, "test": 3}
    data = {"source": {"kind": "file", "path": str(folder / "rows.jsonl")}, "splits": sizes, "max_length": 200, **data}
    return RunConfig.model_validate(
        {
            "model": {"source": str(folder / "tiny"), "dtype": "fp32"},
            "data": data,
            "objective": {"name": "sft"},
            "output_dir": str(folder / "out"),
        }
    )


def test_examples_are_taken_out_of_training_and_written_into_the_config(folder):
    one = config(folder, few_shot=3)
    prepared = prepare(one)
    assert (len(prepared.splits["train"]), len(prepared.splits["examples"]), prepared.shots) == (20, 3, [])
    ids = [record.id for some in prepared.splits.values() for record in some]
    assert len(set(ids)) == len(ids)
    checked = check(one, 1)
    text = checked.template.prompt_text(QUESTION)
    for shot in prepared.splits["examples"]:
        assert f"Question: {shot.question}\nAnswer: {shot.chosen}\n\n" in text
    with pytest.raises(UserError, match="examples of this run are not known"):
        template_of(one, tiny_tokenizer())
    dump_config(with_examples(one, prepared), folder / "run" / "config.yaml")
    again = load_config(folder / "run" / "config.yaml")
    assert template_of(again, checked.template.tokenizer).hash == checked.template.hash
    assert prepare(again).data_hash == prepared.data_hash
    assert prepare(config(folder)).data_hash != prepared.data_hash
    write(folder / "few.jsonl", [{"question": f"{i}?", "answers": ["x"]} for i in range(9)])
    none = {"train": None, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}
    few = config(folder, few_shot=32, splits=none, source={"kind": "file", "path": str(folder / "few.jsonl")})
    with pytest.raises(UserError, match=r"data\.few_shot: 32 asked for, but only 9"):
        prepare(few)


def test_examples_of_your_own_are_part_of_the_data(folder):
    mine = [{"question": "Is it?", "answer": "It is."}]
    prepared = prepare(config(folder, examples=mine))
    assert len(prepared.splits["train"]) == 20
    assert prepared.data_hash != prepare(config(folder)).data_hash
    assert "Question: Is it?\nAnswer: It is.\n\n" in check(config(folder, examples=mine), 1).template.prompt_text(
        QUESTION
    )


def test_a_template_in_a_file_counts_from_the_config(folder):
    (folder / "ask.j2").write_text("Q: {{ question }}\nA:")
    (folder / "job.yaml").write_text("data: {template: jinja, prompt_template: ask.j2}\n")
    data = load_config(folder / "job.yaml").data
    assert data.prompt_template == str(folder / "ask.j2")
    assert prompts_of(data, 12).source == "Q: {{ question }}\nA:"
    assert (
        load_config(folder / "job.yaml", ["data.prompt_template='{{ question }}'"]).data.prompt_template
        == "{{ question }}"
    )
    with pytest.raises(UserError, match="cannot be read"):
        prompts_of(DataConfig(template="jinja", prompt_template="nowhere.j2"), 12)
    with pytest.raises(ValueError, match="needs `prompt_template`"):
        DataConfig(template="jinja")
    with pytest.raises(ValueError, match="not with plain"):
        DataConfig(prompt_template="{{ question }}")

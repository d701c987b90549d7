"""Token ids and labels of conversations against TRL's SFTTrainer and DPOTrainer: the same rows, the same tokenizer."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import pytest

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import encode_records
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.templates import Template
from calibtrain.data.turns import IGNORED
from tests.chat_families import SYSTEM, THOUGHT, TOKENS, TURNS, family_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.peer

CONVERSATIONS = [TURNS[:2], TURNS, [SYSTEM, *TURNS]]
SHIPPED = {"llama3": "llama3", "qwen3": "qwen3", "gemma3": "gemma3", "phi": "phi3"}
"""Our family -> TRL's name of the original template and of the one that it trains with."""


def trl_template(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache
def tokenizer_of(name, training=False):
    tokenizer = copy.deepcopy(family_tokenizer(name))
    if training:
        tokenizer.chat_template = trl_template(f"{SHIPPED[name]}_training")
    return tokenizer


def trl_rows(rows, tokenizer, folder, **config):
    """input_ids and labels that TRL's SFTTrainer makes of the rows."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=tiny_model(len(tokenizer)),
        args=SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **config),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def our_rows(rows, template):
    """The same of ours: ids, and labels with IGNORED; one sequence a row."""
    found = []
    for row in rows:
        record = record_from_row(row, find_layout(list(row), {}, "rows"), "rows:1")
        [[one]] = encode_records([record], template, 512, pairs=False, drops=DropReport())
        labels = [IGNORED] * len(one.ids)
        for place, label in one.learned:
            labels[place] = label
        found.append((list(one.ids), labels))
    return found


def without_tail(ids, labels, end):
    """TRL's ids up to the last end token, and its labels without the whitespace behind each end token."""
    last = len(ids) - ids[::-1].index(end)
    after, kept = False, []
    for token, label in zip(ids[:last], labels[:last], strict=True):
        kept.append(IGNORED if after else label)
        after = label != IGNORED and (after or token == end)
    return ids[:last], kept


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("turns", [*CONVERSATIONS, THOUGHT])
def test_our_templates_render_what_the_originals_do(name, turns):
    ours, theirs = tokenizer_of(name), copy.deepcopy(tokenizer_of(name))
    theirs.chat_template = trl_template(SHIPPED[name])
    for count in range(1, len(turns) + 1):
        if turns[count - 1]["role"] != "system":
            for asks in (False, True):
                shown = [
                    one.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=asks)
                    for one in (ours, theirs)
                ]
                assert shown[0] == shown[1]


def test_qwens_tools_are_rendered_as_the_original_does():
    ours, theirs = tokenizer_of("qwen3"), copy.deepcopy(tokenizer_of("qwen3"))
    theirs.chat_template = trl_template("qwen3")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    turns = [
        SYSTEM,
        {"role": "user", "content": "How is Lyon?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call, call]},
        {"role": "tool", "name": "weather", "content": "18"},
        {"role": "tool", "name": "weather", "content": "19"},
        {"role": "assistant", "content": "Mild."},
    ]
    for count in (2, 3, 4, 5, 6):
        shown = [one.apply_chat_template(turns[:count], tools=[tool], tokenize=False) for one in (ours, theirs)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_marks_are_read_as_trl_reads_them(name, tmp_path):
    tokenizer = tokenizer_of(name, training=True)
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    theirs = trl_rows(rows, tokenizer, tmp_path, assistant_only_loss=True)
    for (ids, labels), (their_ids, their_labels) in zip(
        our_rows(rows, Template("chat", tokenizer)), theirs, strict=True
    ):
        # What stands behind the last label is of no use to either.
        assert ids == their_ids[: len(ids)]
        assert labels == their_labels[: len(ids)]
        assert set(their_labels[len(ids) :]) <= {IGNORED}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi"])
def test_prefix_differences_find_what_trl_finds_with_marks(name, tmp_path):
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    theirs = trl_rows(rows, tokenizer_of(name, training=True), tmp_path, assistant_only_loss=True)
    template = Template("chat", tokenizer_of(name))
    assert our_rows(rows, template) == [without_tail(*one, template.end_id) for one in theirs]


@pytest.mark.parametrize("name", TOKENS)
def test_a_prompt_and_its_completion_are_split_where_trl_splits_them(name, tmp_path):
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in CONVERSATIONS]
    kwargs = {"enable_thinking": False} if name == "qwen3" else {}
    template = Template("chat", tokenizer_of(name), kwargs)
    theirs = trl_rows(
        [{**row, "chat_template_kwargs": kwargs} if kwargs else row for row in rows],
        tokenizer_of(name),
        tmp_path,
        completion_only_loss=True,
    )
    ours = our_rows(rows, template)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if name == "mistral" and rows[i]["prompt"][0]["role"] == "system":
            # The template leaves the system text out of whole conversations: TRL trains without it, we as it is asked.
            assert "Be brief." in template.tokenizer.decode(one[0])
            assert "Be brief." not in template.tokenizer.decode(other[0])
            continue
        assert one == without_tail(*other, template.end_id)


def test_a_text_is_learned_as_trl_learns_it(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"text": "The quick brown fox."}, {"text": "Osaka\n\nJapan"}]
    theirs = trl_rows(rows, tokenizer, tmp_path)
    for (ids, labels), (their_ids, their_labels) in zip(
        our_rows(rows, Template("plain", tokenizer)), theirs, strict=True
    ):
        assert (ids, labels[1:]) == (their_ids, their_labels[1:])  # nothing predicts the first


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi", "smollm", "mistral"])
def test_pairs_are_split_where_trls_dpo_splits_them(name, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    wrong = [{"role": "assistant", "content": "Austria, I think."}]
    rows = [{"chosen": turns, "rejected": [*turns[:-1], *wrong]} for turns in CONVERSATIONS[:2]]
    tokenizer = tokenizer_of(name)
    trainer = DPOTrainer(
        model=tiny_model(len(tokenizer)),
        ref_model=tiny_model(len(tokenizer)),
        args=DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    template = Template("chat", tokenizer)
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        record = record_from_row(row, find_layout(list(row), {}, "rows"), "rows:1")
        [pair] = encode_records([record], template, 512, pairs=True, drops=DropReport())
        for one, answer in zip(pair, ("chosen_ids", "rejected_ids"), strict=True):
            assert list(one.ids[: one.completion_start]) == theirs["prompt_ids"]
            ids = theirs[answer]
            assert list(one.ids[one.completion_start :]) == ids[: len(ids) - ids[::-1].index(template.end_id)]


def test_layouts_are_taken_apart_as_trl_takes_them_apart():
    pytest.importorskip("trl")
    from trl.data_utils import extract_prompt, maybe_convert_to_chatml, unpair_preference_dataset

    shared = [{"from": turn["role"], "value": turn["content"]} for turn in [SYSTEM, *TURNS]]
    ours = record_from_row({"conversations": shared}, find_layout(["conversations"], {}, "rows"), "rows:1")
    theirs = maybe_convert_to_chatml({"conversations": copy.deepcopy(shared)})["messages"]
    assert [(turn.role, turn.content) for turn in ours.turns] == [(one["role"], one["content"]) for one in theirs]

    wrong = {"role": "assistant", "content": "Austria"}
    pair = {"chosen": TURNS, "rejected": [*TURNS[:-1], wrong]}
    ours, theirs = record_from_row(pair, find_layout(list(pair), {}, "rows"), "rows:1"), extract_prompt(pair)
    assert [(turn.role, turn.content) for turn in ours.prompt] == [
        (one["role"], one["content"]) for one in theirs["prompt"]
    ]
    assert (ours.chosen, ours.rejected) == (theirs["chosen"][0]["content"], theirs["rejected"][0]["content"])

    from datasets import Dataset

    apart = unpair_preference_dataset(Dataset.from_list([theirs]))
    for row in apart:
        found = record_from_row(row, find_layout(list(row), {}, "rows", labelled=True), "rows:1")
        assert (found.chosen if row["label"] else found.rejected) == row["completion"][0]["content"]
        assert (found.rejected if row["label"] else found.chosen) is None

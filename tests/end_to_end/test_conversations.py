"""A tiny model learns conversations of every shape in one run: turns, tools, text as it stands, weights; packed."""

import json
import os

import pytest

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from tests.chat_families import family_tokenizer
from tests.distributed.jobs import metrics, write_job
from tests.tiny import tiny_model

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def turns(i):
    return [
        {"role": "user", "content": f"What is {i}?"},
        {"role": "assistant", "content": f"<think>\n{i}\n</think>\n\nIt is {i}."},
        {"role": "user", "content": f"And {i + 1}?"},
        {"role": "assistant", "content": f"It is {i + 1}."},
    ]


def called(i):
    return [
        {"role": "user", "content": f"How is it, {i}?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": str(i), "name": "weather"},
        {"role": "assistant", "content": "Mild."},
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = tmp_path_factory.mktemp("conversations")
    tokenizer = family_tokenizer("qwen3")
    tiny_model(len(tokenizer)).save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    rows = [{"messages": turns(i), "w": 1 + i % 3} for i in range(12)]
    rows += [{"messages": called(i), "tools": [TOOL], "w": 0.5} for i in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_job(
        folder,
        model={"source": str(folder / "chat")},
        data={
            "source": {"kind": "file", "path": str(folder / "chat.jsonl"), "columns": {"weight": "w"}},
            "questions": None,
            "splits": {"train": None, "calibration": 0, "temperature": 0, "certification": 0, "test": 0},
            "template": "chat",
            "max_length": 420,
            "packing_tokens": 512,
        },
        objective={"name": "sft"},
        penalties=[],
        training={"max_steps": 2},
    )


def test_conversations_train_and_are_exported(job):
    from calibtrain.pipeline import train

    config = load_config(job)
    train.run(config)
    assert (config.output_dir / "model" / "config.json").is_file()
    losses = [line["train/loss/nll"] for line in metrics(config.output_dir) if line["event"] == "log"]
    assert len(losses) == 2
    assert all(4 < loss < 8 for loss in losses)  # ln 400 is 6: a random model, well normalised


def test_the_plain_template_refuses_them_before_a_model_is_loaded(job):
    from calibtrain.pipeline.check import check

    config = load_config(job)
    plain = config.model_copy(update={"data": config.data.model_copy(update={"template": "plain"})})
    with pytest.raises(UserError, match=r"chat\.jsonl:\d+: data\.template: plain cannot write tools"):
        check(plain, 1, replace=True)

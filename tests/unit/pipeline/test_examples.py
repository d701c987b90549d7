"""What the tokens on disk are known by: all that makes them, and nothing else."""

from dataclasses import replace

import pytest

from calibtrain.config import RunConfig
from calibtrain.data.templates import template_of
from calibtrain.pipeline import examples
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer

RECORDS = [Record((Message("user", f"Which is {i}?"),), chosen=f"{i}", origin=f"f:{i}") for i in range(3)]


def key(records=RECORDS, tokenizer=None, **changes):
    config = RunConfig.model_validate({"objective": {"name": "sft"}, **changes})
    return examples.cache_key(config, records, template_of(config, tokenizer or tiny_tokenizer()))


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"learning_rate": 1.0, "micro_batch_size": 1, "zero_stage": 3}, "seed": 3},
        {"data": {"packing_tokens": 1024, "splits": {"test": 7}, "max_dropped": 0.5}, "output_dir": "elsewhere"},
        {"evaluation": {"batch_size": 3}, "tracking": {"wandb": False}, "objective": {"name": "focal"}},
        {"records": [replace(one, origin="elsewhere", name="mine", strata={"kind": "sum"}) for one in RECORDS]},
    ],
)
def test_the_same_tokens_are_found_again(changes):
    assert key(**changes) == key()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"max_length": 64}},
        {"data": {"template": "chat"}},
        {"data": {"system": "Digits."}},
        {"data": {"train_on": "last_turn"}},
        {"data": {"strict": True}},
        {"objective": {"name": "orpo"}},
        {"task": {"kind": "number"}},
        {"tokenizer": tiny_tokenizer(vocab_size=390)},
        {"tokenizer": tiny_tokenizer(add_bos=True)},
        {"records": RECORDS[::-1]},
        {"records": RECORDS[:2]},
        {"records": [replace(RECORDS[0], chosen="0."), *RECORDS[1:]]},
        {"records": [replace(RECORDS[0], weight=2.0), *RECORDS[1:]]},
    ],
)
def test_other_tokens_have_another_name(changes):
    assert key(**changes) != key()


def test_another_versions_tokens_are_not_read(monkeypatch):
    before = key()
    monkeypatch.setattr(examples.transformers, "__version__", "0")
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(examples, "_code_hash", lambda: "another")
    assert key() != before

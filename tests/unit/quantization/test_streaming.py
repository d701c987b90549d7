"""A model of which one block at a time lies in memory computes what the whole one does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibtrain.errors import UserError
from calibtrain.quantization.blocks import Text, first_inputs, passed_through, run_block
from calibtrain.quantization.streaming import StreamedModel
from tests.tiny import tiny_model
from tests.unit.quantization.test_folds import build

TEXTS = [Text([5, 6, 7, 8], [9, 10]), Text([11, 12], [13])]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral"])
def test_blocks_one_after_the_other_are_the_model(tmp_path, name):
    build(name, torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    streamed = StreamedModel(tmp_path)
    batch = first_inputs(streamed.model, TEXTS, 0)[0]
    ids = torch.tensor([[11, 12, 13, 0, 0, 0], [5, 6, 7, 8, 9, 10]])
    for index in range(len(streamed.blocks)):
        block = streamed.bring(index)
        with torch.no_grad():
            batch = batch.with_hidden(run_block(block, index, batch))
        streamed.drop(index)
    final = passed_through(streamed.model, ids, batch.hidden)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(final[batch.real], wanted[batch.real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_lies_outside_the_blocks_is_kept_once(tmp_path, tied):
    tiny_model(tied=tied).save_pretrained(tmp_path)
    names = set(StreamedModel(tmp_path).others())
    assert names == {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})


def test_only_the_blocks_that_were_brought_take_memory(tmp_path):
    tiny_model(layers=3).save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path)
    streamed.bring(1)
    assert [any(one.is_meta for one in block.parameters()) for block in streamed.blocks] == [True, False, True]


def test_a_model_without_a_dtype_is_told(tmp_path):
    import json

    tiny_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("dtype", settings.pop("torch_dtype", None))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="names no dtype"):
        StreamedModel(tmp_path)

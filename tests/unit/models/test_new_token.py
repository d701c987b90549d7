"""A new token starts where its words are."""

from __future__ import annotations

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.models.new_token import add_token
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_new_token_starts_at_the_mean_of_its_words(tied):
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), tied=tied)
    sources = [one for word in ("not", "sure") for one in tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
    before = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    index = add_token(model, tokenizer, "[IDK]", like=("not", "sure"))
    assert index == len(tokenizer) - 1
    assert tokenizer("so [IDK]", add_special_tokens=False)["input_ids"][-1] == index
    for name, layer in layers(model).items():
        assert layer.weight.shape[0] == index + 1
        torch.testing.assert_close(layer.weight[index], before[name][sources].mean(0))
        assert torch.equal(layer.weight[:index], before[name][:index])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert model(input_ids=torch.tensor([[index, 3]])).logits.shape[-1] == index + 1
    assert add_token(model, tokenizer, "[IDK]") == index  # a second call changes nothing
    assert tokenizer.eos_token_id == tiny_tokenizer().eos_token_id


def test_room_that_is_there_is_used():
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer) + 64)
    index = add_token(model, tokenizer)
    assert index == len(tokenizer) - 1
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 63


def test_words_are_needed():
    with pytest.raises(UserError, match="like"):
        add_token(tiny_model(), tiny_tokenizer(), like=())


def layers(model):
    return {"in": model.get_input_embeddings(), "out": model.get_output_embeddings()}

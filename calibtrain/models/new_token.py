"""A token that the model did not have, such as [IDK]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calibtrain.errors import UserError
from calibtrain.models.sharding import unsharded


@torch.no_grad()
def add_token(model: Any, tokenizer: Any, token: str = "[IDK]", like: Sequence[str] = ("unknown", "unsure")) -> int:
    """Make room for `token` in a Hugging Face model and its tokenizer, and return its id; one that is there is kept.

    Its embeddings, in and out, start at the mean of those of the tokens of the words `like`: near in meaning, and as
    likely as any of them. Call it before deepspeed.initialize, and save the tokenizer with the model. Collective where the
    weights lie in parts: each rank holds the embeddings whole for a moment. Raises UserError for a word without tokens.
    """
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return int(known)
    sources = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in like]
    if not sources or not all(sources):
        raise UserError(f"like: {list(like)} has no tokens to begin {token} from; name words that the tokenizer knows")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    index = int(tokenizer.convert_tokens_to_ids(token))
    ids = torch.tensor([one for source in sources for one in source])
    with unsharded(lambda: (model.get_input_embeddings(), model.get_output_embeddings())):
        if index >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(index + 1, mean_resizing=False)
        layers = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        for layer in layers.values():
            for parameter in (layer.weight, getattr(layer, "bias", None)):
                if parameter is not None:
                    parameter[index] = parameter[ids].float().mean(dim=0).to(parameter.dtype)
    return index

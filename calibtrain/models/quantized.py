"""Quantised models, as compressed-tensors directories hold them: which there are, and how one is made ready to run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from calibtrain.errors import UserError

COMPRESSED_TENSORS = "compressed-tensors"
"""The method that is read and written here."""


def require_compressed_tensors() -> None:
    """Raise UserError where the package that writes and reads quantised models is not installed. It is not imported."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError('a quantised model needs compressed-tensors: run `pip install "calibtrain[quantization]"`')


def quantisation_of(settings: Any) -> str | None:
    """By which method a model is quantised, from its Hugging Face config or config.json; None: in full precision."""
    found = _entry(settings, "quantization_config")
    if not found:
        return None
    method = _entry(found, "quant_method")
    return str(getattr(method, "value", method) or "unknown method")


def check_full_precision(source: object, settings: Any) -> None:
    """Raise UserError where a model is quantised, which can neither be trained nor quantised once more."""
    method = quantisation_of(settings)
    if method is not None:
        raise UserError(
            f"{source}: is quantised already ({method}); give the model in full precision that it is made of"
        )


def decompress(model: Any) -> None:
    """Unpack a model's weights, once and for all; activations go on being rounded where its scheme says so.

    transformers would unpack them when the whole model is first called, and the decoder may be called by itself before.
    It would also tie every module to the device where that happens.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not hasattr(model, "ct_decompress_hook") or quantizer is None:
        return
    from compressed_tensors.compressors import decompress_module

    for module in model.modules():
        decompress_module(module)  # does nothing to one that is not quantised
    quantizer.compressor.remove_decompression_hook(model)


@contextmanager
def without_bars() -> Iterator[None]:
    """Let compressed-tensors draw no progress bars, for a second of work."""
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply

    places: tuple[Any, ...] = (model_compressor, apply)
    kept = [place.tqdm for place in places]
    try:
        for place in places:
            place.tqdm = lambda items, **_: items
        yield
    finally:
        for place, bar in zip(places, kept, strict=True):
            place.tqdm = bar


def _entry(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)

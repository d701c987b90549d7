"""torch.compile of a model's layers, for training alone: they share one compilation, whatever the rows' widths."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch

from calibtrain.errors import UserError
from calibtrain.ops.block_cpp import find_compiler


def compile_layers(model: Any) -> None:
    """Compile the forward pass of each repeated layer of a Hugging Face model, in place; parameters keep their names.

    Passes without gradients run as they are: decoding changes its shapes at every token. Raises UserError for a model
    that does not say what its layers are, or where there is no C++ compiler.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"model.compile: {type(model).__name__} does not name its layers; set it to false")
    if find_compiler() is None:
        raise UserError("model.compile needs a C++ compiler (c++, g++ or clang++ on PATH, or $CXX); set it to false")
    for layer in layers:
        kind: Any = type(layer)
        layer.forward = MethodType(_training_forward(kind), layer)


@functools.cache
def _training_forward(kind: Any) -> Any:
    """`kind.forward`, compiled where a gradient is asked for. One for all layers of a kind, so that it compiles once."""
    plain: Any = kind.forward
    # Dynamic from the first call: a shape compiled for itself would round differently, and a resumed run with it.
    compiled = torch.compile(plain, dynamic=True)

    @functools.wraps(plain)
    def forward(layer: Any, *args: Any, **options: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(layer, *args, **options)

    return forward

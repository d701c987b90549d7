"""Which scales may be moved from the inputs of a layer into what makes them, without changing what a block computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibtrain.quantization.blocks import is_matrix, matrix_of


@dataclass(frozen=True, slots=True)
class Fold:
    """What makes a layer's inputs, and all that read them: inputs / s and columns * s leave every output as it was.

    Names are those within a block.
    """

    source: str
    targets: tuple[str, ...]
    part: str  # the module whose output shows what an error of the targets does: attention, MLP, or the target itself
    form: Literal["norm", "norm plus one", "rows"] = "norm"  # a norm multiplies by w or by 1 + w; else rows of a matrix
    reads: str | None = ""  # the module whose inputs the targets read; "": the first target; None: no module's
    first_row: int = 0  # of `rows`: where the scaled ones begin in a fused matrix
    heads: tuple[int, int] | None = None  # of values: query heads that share one, and the width of a head

    @property
    def published(self) -> bool:
        """Whether SmoothQuant's authors fold here: from a norm. The others are as exact."""
        return self.form != "rows"

    @property
    def observed(self) -> str | None:
        """The module whose inputs are the ones that are scaled, or None where experts hide them."""
        return self.targets[0] if self.reads == "" else self.reads


def folds_of(model_or_config: Any, block: nn.Module) -> list[Fold]:
    """Every exact fold of a block, in the order it computes. None of an architecture without an entry: no guesses."""
    config = text_config_of(model_or_config)
    entry = _TABLE.get(config.model_type)
    return entry(config, block) if entry else []


def no_folds_reason(model_or_config: Any) -> str | None:
    """Why nothing can be folded in this model, in words for its user; None where its architecture has an entry."""
    kind = text_config_of(model_or_config).model_type
    return None if kind in _TABLE else f"no exact folds are known for the architecture {kind!r}: no scale is moved"


def writers_of(model_or_config: Any, block: nn.Module | None = None) -> tuple[str, ...]:
    """Names of what is added to the residual stream as it is, within any block or this one; none where they are not known.

    Norms of these architectures have no mean and no bias, and none lies between a layer and the stream.
    """
    names = _WRITERS.get(text_config_of(model_or_config).model_type, ())
    return names if block is None else tuple(name for name in names if _has(block, name))


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the source by `scale` (in,) and multiply the targets' columns by it, in place, in float32, rounded once.

    For experts that are one parameter, `scale` is (in,), or (experts, in) where the rows are theirs. Of values that query
    heads share, the scale must be shared too (`shared_by_heads`).

    A norm's weight is rounded to its dtype first, and the columns are multiplied by the scale that it really took; so
    rounding a norm costs nothing, not even where 1 + w is small.
    """
    scale = high(scale)
    taken = _divide_rows(block, fold, scale) if fold.form == "rows" else _divide_norm(block, fold, scale)
    for name in fold.targets:
        weight = weight_in(block, name)
        weight.copy_(high(weight) * taken[..., None, :])


def shared_by_heads(fold: Fold, statistic: Tensor, how: Literal["max", "mean"]) -> Tensor:
    """(in,) of a statistic of the inputs, equal over the query heads that share a value; as it is for other folds."""
    if fold.heads is None:
        return statistic
    parts = statistic.unflatten(0, (-1, *fold.heads))
    one = parts.amax(1, keepdim=True) if how == "max" else parts.mean(1, keepdim=True)
    return one.expand_as(parts).flatten()


def weight_in(block: nn.Module, name: str) -> Tensor:
    """A view (out, in), or (experts, out, in), of the weight of a layer or of a fused parameter."""
    owner, _, last = name.rpartition(".")
    found: Any = getattr(block.get_submodule(owner), last)
    if isinstance(found, nn.Parameter):
        return found
    return matrix_of(found) if is_matrix(found) else found.weight  # a router keeps (experts, in) without being a Linear


def _divide_norm(block: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    norm: Any = block.get_submodule(fold.source)
    offset = 1.0 if fold.form == "norm plus one" else 0.0
    before = high(norm.weight) + offset
    norm.weight.copy_(before / scale - offset)
    after = high(norm.weight) + offset
    taken = torch.where((before != 0) & (after != 0), before / after, scale)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(high(norm.bias) / taken)
    return taken


def _divide_rows(block: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    by = scale
    if fold.heads is not None:
        parts = scale.unflatten(0, (-1, *fold.heads))
        if not torch.equal(parts, parts[:, :1].expand_as(parts)):
            raise ValueError(f"{fold.source}: query heads that share a value must share its scale")
        by = parts[:, 0].flatten()
    rows = slice(fold.first_row, fold.first_row + by.shape[-1])
    weight = weight_in(block, fold.source)[..., rows, :]
    weight.copy_(high(weight) / by[..., None])
    owner, _, last = fold.source.rpartition(".")
    bias = getattr(getattr(block.get_submodule(owner), last), "bias", None)
    if bias is not None:
        bias[rows] = (high(bias[rows]) / by).to(bias.dtype)
    return scale


def _has(block: nn.Module, name: str) -> bool:
    owner: Any = block
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner is not None


def high(x: Tensor) -> Tensor:
    """In at least float32, in which folds are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def text_config_of(model_or_config: Any) -> Any:
    """The config of the language model, of a model or of its config."""
    return getattr(model_or_config, "config", model_or_config).get_text_config()


def _attention(config: Any, norm: Literal["norm", "norm plus one"] = "norm") -> list[Fold]:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [
        Fold("input_layernorm", qkv, "self_attn", norm),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "rows", heads=_heads(config)),
    ]


def _heads(config: Any) -> tuple[int, int] | None:
    shared = config.num_attention_heads // config.num_key_value_heads
    return (shared, head_dim_of(config)) if shared > 1 else None


def head_dim_of(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _mlp(norm_name: str, norm: Literal["norm", "norm plus one"] = "norm") -> list[Fold]:
    return [
        Fold(norm_name, ("mlp.gate_proj", "mlp.up_proj"), "mlp", norm),
        Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "rows"),
    ]


def _llama(config: Any, block: nn.Module) -> list[Fold]:
    return _attention(config) + _mlp("post_attention_layernorm")


def _gemma(config: Any, block: nn.Module) -> list[Fold]:
    return _attention(config, "norm plus one") + _mlp("post_attention_layernorm", "norm plus one")


def _gemma2(config: Any, block: nn.Module) -> list[Fold]:
    # Its post_attention_layernorm is behind the attention, in front of the residual.
    return _attention(config, "norm plus one") + _mlp("pre_feedforward_layernorm", "norm plus one")


def _phi3(config: Any, block: nn.Module) -> list[Fold]:
    values = (config.num_attention_heads + config.num_key_value_heads) * head_dim_of(config)
    qkv, output = "self_attn.qkv_proj", "self_attn.o_proj"
    return [
        Fold("input_layernorm", (qkv,), "self_attn"),
        Fold(qkv, (output,), output, "rows", first_row=values, heads=_heads(config)),
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
        Fold("mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj", "rows", first_row=config.intermediate_size),
    ]


def _gpt2(config: Any, block: nn.Module) -> list[Fold]:
    # c_fc -> mlp.c_proj is not exact: a GELU lies between them.
    return [
        Fold("ln_1", ("attn.c_attn",), "attn"),
        Fold("attn.c_attn", ("attn.c_proj",), "attn.c_proj", "rows", first_row=2 * config.hidden_size),
        Fold("ln_2", ("mlp.c_fc",), "mlp"),
    ]


def _mixture(config: Any, block: nn.Module) -> list[Fold]:
    experts = getattr(block.mlp, "experts", None)
    if experts is None:  # Qwen keeps some blocks dense
        return _llama(config, block)
    joined, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    targets = [joined, "mlp.gate"]  # the router reads what the experts read
    rest = [Fold(joined, (down,), down, "rows", reads=None, first_row=experts.gate_up_proj.shape[1] // 2)]
    if hasattr(block.mlp, "shared_expert"):
        shared = "mlp.shared_expert"
        targets += [f"{shared}.gate_proj", f"{shared}.up_proj", "mlp.shared_expert_gate"]
        rest.append(Fold(f"{shared}.up_proj", (f"{shared}.down_proj",), f"{shared}.down_proj", "rows"))
    norm = Fold("post_attention_layernorm", tuple(targets), "mlp", reads="mlp")
    return [*_attention(config), norm, *rest]


_TABLE: dict[str, Callable[[Any, nn.Module], list[Fold]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "smollm3": _llama,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "mixtral": _mixture,
    "qwen2_moe": _mixture,
    "qwen3_moe": _mixture,
}
"""By config.model_type, as transformers 5 names the layers."""

_DENSE = ("self_attn.o_proj", "mlp.down_proj")
_SPARSE = (*_DENSE, "mlp.experts.down_proj", "mlp.shared_expert.down_proj")
_WRITERS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3"), _DENSE) | dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe"), _SPARSE
)
"""By config.model_type: what writes into the residual stream. Gemma 2 and 3 have a norm between, GPT-2 norms with a mean."""

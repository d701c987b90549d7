"""Where the (out, in) matrices of linear layers lie in a checkpoint's tensors, told from names, shapes and config.json.

A tensor holds one matrix, or several: queries, keys and values in one, gate and up in one, a stack of experts. Each is a
`Part`. A fused tensor whose model is not named in these tables is taken whole: that is still the matrix of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Models of transformers' Conv1D, which stores (in, out)."""
CONV1D_NAMES = {"c_attn", "q_attn", "c_proj", "c_fc"}
IN_FIRST_EXPERTS = {"gpt_oss", "openai_privacy_filter", "llama4", "aria", "qwen3_vl_moe"}
"""Models whose stacks of experts are (experts, in, out) in files. Others are (experts, out, in)."""
ALTERNATING = {"gpt_oss"}
"""Models whose experts hold gate and up in alternating rows, not one after the other."""
GRANITE = {"granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"}
"""Models whose input_linear is gate and up."""
EXPERTS_UP = {"gate_up_proj", "gate_proj", "up_proj", "input_linear"}
EXPERTS_DOWN = {"down_proj", "output_linear"}
EMBEDDINGS = {"wte", "wpe", "shared", "embedding", "embeddings", "emb", "relative_attention_bias"}
HEADS = {"lm_head", "embed_out", "score", "classifier", "v_head", "qa_outputs"}


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of a fused (out, in) matrix: rows seen as `grid`, of which `start` to `stop` along `axis`."""

    label: str
    grid: tuple[int, ...]
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """One (out, in) matrix in a stored tensor."""

    expert: int | None = None  # its place in a stack
    experts: int | None = None  # so many experts are stacked in the rows of a 2-D tensor
    in_first: bool = False
    cut: Cut | None = None

    def block(self, stored: Tensor) -> Tensor:
        """View of the contiguous block of `stored` that holds the matrix: one expert's, or the whole tensor."""
        stack = stored if self.experts is None else stored.unflatten(0, (self.experts, -1))
        return stack if self.expert is None else stack[self.expert]

    def view(self, block: Tensor) -> Tensor:
        """View of a block that holds the matrix: its last dimension is `in`, the ones before flatten to `out`."""
        return self.rows(block.mT if self.in_first else block)

    def rows(self, matrix: Tensor) -> Tensor:
        """View of the rows that are its own, of a whole (out, anything) matrix."""
        if self.cut is None:
            return matrix
        return matrix.unflatten(0, self.cut.grid).narrow(self.cut.axis, self.cut.start, self.cut.stop - self.cut.start)

    def name(self, tensor: str) -> str:
        """`tensor`, with the expert's number and the part's label in brackets where it holds several matrices."""
        number = "" if self.expert is None else f"[{self.expert}]"
        return tensor + number + ("" if self.cut is None else f"[{self.cut.label}]")

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the matrix in a tensor of the shape `stored`."""
        rows, columns = stored[-2:]
        rows = rows if self.experts is None else rows // self.experts
        rows, columns = (columns, rows) if self.in_first else (rows, columns)
        if self.cut is not None:
            rows = rows // self.cut.grid[self.cut.axis] * (self.cut.stop - self.cut.start)
        return rows, columns


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor's name tells."""

    layer: int | None  # the first number in the name that is not an expert's
    expert: int | None
    path: tuple[str, ...]  # names of the modules without numbers and "weight": ("model", "layers", "mlp", "up_proj")

    @property
    def last(self) -> str:
        """Name of the module that holds it."""
        return self.path[-1] if self.path else ""


def place(name: str) -> Place:
    """Layer, expert and modules in a tensor's name."""
    layer = expert = None
    path: list[str] = []
    for word in name.split("."):
        if not word.isdecimal():
            path.append(word)
        elif path and path[-1] == "experts":
            expert = int(word)
        elif layer is None:
            layer = int(word)
    if len(path) > 1 and path[-1] == "weight":
        path.pop()
    return Place(layer, expert, tuple(path))


def kind(name: str, shape: tuple[int, ...]) -> str:
    """What a floating tensor is: "matrix", "embedding", "head", or why it is none of them ("": it is no matrix at all)."""
    at = place(name)
    if len(shape) < 2:
        return ""
    if at.last in HEADS:
        return "head"
    if (
        at.last in EMBEDDINGS
        or at.last.startswith("embed_")
        or at.last.endswith(("_embed", "_embedding", "_embeddings"))
    ):
        return "embedding"
    if "norm" in at.last or at.last.startswith("ln_"):
        return "weights of a normalisation"
    stacked = _is_stack(at, shape)
    if len(shape) > 2 and not stacked:
        return f"shape {list(shape)} is neither a matrix nor a known stack of experts"
    if stacked or name.endswith(".weight"):
        return "matrix"
    return "not the weight of a linear layer"


def parts(name: str, shape: tuple[int, ...], settings: Mapping[str, Any]) -> list[Part]:
    """The matrices in a tensor that is a "matrix", "embedding" or "head" by `kind`. `settings`: its model's config.json."""
    at, model = place(name), model_type(settings)
    if len(shape) == 3:
        in_first = _stack_is_in_first(at.last, shape, settings)
        cuts = _cuts(at, shape[2] if in_first else shape[1], settings)
        return [Part(expert, None, in_first, cut) for expert in range(shape[0]) for cut in cuts]
    if model == "dbrx" and at.last in ("w1", "v1", "w2"):
        experts = int((settings.get("ffn_config") or {}).get("moe_num_experts", 4))
        return [Part(expert, experts, at.last == "w2") for expert in range(experts)]
    in_first = model in CONV1D and at.last in CONV1D_NAMES
    return [Part(None, None, in_first, cut) for cut in _cuts(at, shape[1] if in_first else shape[0], settings)]


def model_type(settings: Mapping[str, Any]) -> str:
    """Its text model's type, without transformers' suffix "_text"."""
    return str(setting(settings, "model_type") or "").removesuffix("_text")


def setting(settings: Mapping[str, Any], *names: str) -> Any:
    """The first of the names that config.json sets, its text model's config before its own; None where none is."""
    for level in (settings.get("text_config"), settings):
        for name in names:
            if isinstance(level, Mapping) and level.get(name) is not None:
                return level[name]
    return None


def _is_stack(at: Place, shape: tuple[int, ...]) -> bool:
    if len(shape) == 3:
        named = "experts" in at.path and at.last in EXPERTS_UP | EXPERTS_DOWN
        return named or at.last in ("input_linear", "output_linear")
    return len(shape) == 2 and at.path[-3:-1] == ("experts", "mlp") and at.last in ("w1", "v1", "w2")


def _stack_is_in_first(module: str, shape: tuple[int, ...], settings: Mapping[str, Any]) -> bool:
    """The side that is as long as the hidden state tells; the table where both are."""
    hidden = setting(settings, "hidden_size")
    side, other = (2, 1) if module in EXPERTS_UP else (1, 2)
    if (shape[side] == hidden) != (shape[other] == hidden):
        return bool(shape[other] == hidden)
    return model_type(settings) in IN_FIRST_EXPERTS


def _cuts(at: Place, rows: int, settings: Mapping[str, Any]) -> list[Cut | None]:
    model, module = model_type(settings), at.last
    if "crossattention" in at.path:  # queries lie in a tensor of their own there
        return [None]
    if module == "gate_up_proj" or (module == "input_linear" and model in GRANITE):
        if rows % 2:
            return [None]
        grid, axis = ((rows // 2, 2), 1) if model in ALTERNATING else ((2, rows // 2), 0)
        return [Cut("gate", grid, axis, 0, 1), Cut("up", grid, axis, 1, 2)]
    fused = FUSED.get((model, module))
    return [None] if fused is None else [*fused(rows, settings)] or [None]


def _thirds(rows: int, settings: Mapping[str, Any]) -> list[Cut]:
    """All queries, all keys, all values."""
    return _blocks(rows, 1, 1)


def _blocks(rows: int, heads: int, groups: int) -> list[Cut]:
    if rows % (heads + 2 * groups):
        return []
    grid = (heads + 2 * groups, rows // (heads + 2 * groups))
    ends = (0, heads, heads + groups, heads + 2 * groups)
    return [Cut(label, grid, 0, *ends[i : i + 2]) for i, label in enumerate("qkv")]


def _in_order(rows: int, settings: Mapping[str, Any]) -> list[Cut]:
    """All queries, then the keys of all groups, then their values."""
    heads = _heads(settings)
    return _blocks(rows, heads, _groups(settings)) if heads else []


def _by_group(rows: int, settings: Mapping[str, Any]) -> list[Cut]:
    """Group by group: the queries of its heads, its key, its value."""
    heads, groups = _heads(settings), _groups(settings)
    if not heads or heads % groups or rows % (heads + 2 * groups):
        return []
    each = heads // groups
    grid = (groups, each + 2, rows // (heads + 2 * groups))
    return [Cut("q", grid, 1, 0, each), Cut("k", grid, 1, each, each + 1), Cut("v", grid, 1, each + 1, each + 2)]


def _bigcode(rows: int, settings: Mapping[str, Any]) -> list[Cut]:
    return (_in_order if settings.get("multi_query", True) else _by_group)(rows, settings)


def _codegen(rows: int, settings: Mapping[str, Any]) -> list[Cut]:
    """In four slices (of the machines that trained it), each its queries, values and keys."""
    if rows % 12:
        return []
    return [Cut(label, (4, 3, rows // 12), 1, at, at + 1) for label, at in (("q", 0), ("k", 2), ("v", 1))]


def _heads(settings: Mapping[str, Any]) -> int:
    return int(setting(settings, "num_attention_heads", "n_head", "n_heads") or 0)


def _groups(settings: Mapping[str, Any]) -> int:
    model = model_type(settings)
    if model == "falcon" and settings.get("new_decoder_architecture"):
        return int(setting(settings, "num_kv_heads", "n_head_kv") or _heads(settings))
    if model in ("falcon", "gpt_bigcode"):
        return 1 if settings.get("multi_query", True) else _heads(settings)
    if model == "dbrx":
        return int((settings.get("attn_config") or {}).get("kv_n_heads", 1))
    return int((setting(settings, "num_key_value_heads") if model == "phi3" else None) or _heads(settings))


FUSED: dict[tuple[str, str], Callable[[int, Mapping[str, Any]], list[Cut]]] = {
    ("gpt2", "c_attn"): _thirds,
    ("openai-gpt", "c_attn"): _thirds,
    ("mpt", "Wqkv"): _thirds,
    ("phi3", "qkv_proj"): _in_order,
    ("dbrx", "Wqkv"): _in_order,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("gpt_neox", "query_key_value"): _by_group,
    ("gpt_neox_japanese", "query_key_value"): _by_group,
    ("bloom", "query_key_value"): _by_group,
    ("persimmon", "query_key_value"): _by_group,
    ("falcon", "query_key_value"): _by_group,
    ("codegen", "qkv_proj"): _codegen,
}
"""(model_type, module): rows of queries, keys and values, as transformers' forward splits them."""

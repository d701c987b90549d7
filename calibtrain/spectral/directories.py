"""Two Hugging Face directories as pairs of (out, in) matrices, read one at a time from safetensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral import layouts
from calibtrain.spectral.layouts import Part
from calibtrain.spectral.lora_files import Adapter, LowRank, open_adapter
from calibtrain.spectral.model_files import DTYPES, ModelFiles, Stored, open_model

UNTRAINED = "the adapter does not change it"


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight matrix before and after, still on disk. It can be pickled and read in another process."""

    name: str  # the tensor's name in TUNED; of a part "...qkv_proj.weight[q]", of a stack of experts "...down_proj[3]"
    layer: int | None
    module: str  # "q_proj", "qkv_proj.q", "experts.up_proj"; with more of its path where two of a layer share a name
    expert: int | None
    shape: tuple[int, int]  # (out, in)
    dtype: str  # in which TUNED stores it; float32 where that is a LoRA adapter
    before: Stored = field(repr=False)
    after: Stored | LowRank = field(repr=False)
    part: Part = field(repr=False)

    def read(self) -> tuple[Tensor, Tensor]:
        """(W0, W), each (out, in) in its stored dtype and own memory; with a LoRA adapter W0 and W0 + B A in float32.

        Raises UserError where one holds NaN or infinite values.
        """
        first = self.before.read(self.part)
        if isinstance(self.after, Stored):
            return first, self.after.read(self.part)
        left, right = self.after.factors(self.part)
        return first.float(), first.float() + left @ right

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B (out, r) with the scaling in it, A (r, in)) in float32, W - W0 = B A; None where TUNED is no adapter."""
        return None if isinstance(self.after, Stored) else self.after.factors(self.part)


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is compared, and what is not with the reason."""

    pairs: list[Pair]
    left_out: list[tuple[str, str]]


def open_pairs(
    base: Path, tuned: Path, *, layers: set[int] | None = None, modules: Sequence[str] | None = None
) -> Pairs:
    """The matrices of two model directories (`tuned` may be a LoRA adapter), in the order of layers. Only headers are read.

    By default those of linear layers; `modules` names others too (embed_tokens, lm_head), and then those alone: a module
    by its last name, or a part or parent of it (qkv_proj, qkv_proj.q, experts). `layers` keeps these numbers.

    Raises UserError where a directory cannot be read, the architectures differ, or `layers` or `modules` name nothing.
    """
    if base.exists() and tuned.exists() and base.samefile(tuned):
        raise UserError(f"{tuned}: the same directory twice; give the model before training and the one after")
    if is_adapter(base):
        raise UserError(f"{base}: an adapter; the first directory must be the whole model before training")
    first = open_model(base)
    if is_adapter(tuned):
        found = _adapted(first, open_adapter(tuned), tuned)
    else:
        found = _matched(first, open_model(tuned), modules)
    found = Pairs(_apart(found.pairs), found.left_out)
    return _chosen(found, first, layers, modules)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    adapter, model = (path / "adapter_config.json").is_file(), (path / "config.json").is_file()
    if adapter and model and any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: holds a model and an adapter; move one of them to a directory of its own")
    return adapter


def tied_head(model: ModelFiles) -> bool:
    """Whether the head is the embedding: config.json says so, or the head is not among the tensors."""
    heads = any(layouts.place(name).last in ("lm_head", "embed_out") for name in model.tensors)
    return not heads or layouts.setting(model.settings, "tie_word_embeddings") is True


def _matched(base: ModelFiles, tuned: ModelFiles, modules: Sequence[str] | None) -> Pairs:
    names = _same_names(base.tensors, tuned.tensors)
    _check_architecture(base, tuned, names)
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    for name, after in tuned.tensors.items():
        kind, before = _kind(after), base.tensors.get(names[name]) if name in names else None
        if not kind:
            continue
        if kind == "head" and (tied_head(base) or tied_head(tuned)) and layouts.place(name).last in ("lm_head", "embed_out"):
            left_out.append((name, f"tied to the embedding in {(base if tied_head(base) else tuned).path}"))
        elif before is None:
            left_out.append((name, f"only in {tuned.path}"))
        elif kind not in ("matrix", "embedding", "head"):
            left_out.append((name, kind))
        elif before.shape != after.shape:
            why = f"{after.shape[0]} rows, and {before.shape[0]} in {base.path}: the vocabulary was resized"
            why = why if kind != "matrix" else f"shape {list(after.shape)}, and {list(before.shape)} in {base.path}"
            if _asked(modules, layouts.place(name).last):
                raise UserError(f"{name}: {why}, so it cannot be compared; leave it out of modules")
            left_out.append((name, why))
        else:
            pairs += _pairs(name, kind, before, after, base.settings, DTYPES[after.dtype])
    known = set(names.values())
    for name, before in base.tensors.items():
        if name not in known and _kind(before):
            head = layouts.place(name).last in ("lm_head", "embed_out") and tied_head(tuned)
            left_out.append((name, f"tied to the embedding in {tuned.path}" if head else f"only in {base.path}"))
    return Pairs(pairs, left_out)


def _adapted(base: ModelFiles, adapter: Adapter, path: Path) -> Pairs:
    names = _same_names(base.tensors, [*adapter.low_rank, *adapter.whole])
    changes = {**adapter.low_rank, **adapter.whole}
    for name, change in changes.items():
        stored = base.tensors.get(names.get(name, ""))
        if stored is None:
            raise UserError(f"{path}: changes {name}, which {base.path} does not have; give the adapter's own base model")
        kind = layouts.kind(name, stored.shape)
        whole = stored.shape if isinstance(change, Stored) or len(stored.shape) != 2 else _oriented(stored, base)
        if kind in ("matrix", "embedding", "head") and tuple(change.shape) != whole:
            raise UserError(
                f"{path}: {name} is {list(change.shape)}, and {list(whole)} in {base.path}; give the adapter's own base model"
            )
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    tuned_names = {first: second for second, first in names.items()}
    for name, before in base.tensors.items():
        kind = _kind(before)
        if name in tuned_names and kind in ("matrix", "embedding", "head"):
            after = changes[tuned_names[name]]
            dtype = DTYPES[after.dtype] if isinstance(after, Stored) else "float32"
            pairs += _pairs(name, kind, before, after, base.settings, dtype)
        elif kind:
            left_out.append((name, UNTRAINED if kind in ("matrix", "embedding", "head") else kind))
    return Pairs(pairs, left_out)


def _oriented(stored: Stored, base: ModelFiles) -> tuple[int, ...]:
    """Shape (out, in) of a 2-D weight."""
    in_first = layouts.parts(stored.name, stored.shape, base.settings)[0].in_first
    return stored.shape[::-1] if in_first else stored.shape


def _pairs(
    name: str, kind: str, before: Stored, after: Stored | LowRank, settings: Mapping[str, object], dtype: str
) -> list[Pair]:
    at = layouts.place(name)
    found = []
    for part in layouts.parts(name, before.shape, settings) if kind == "matrix" else [Part()]:
        expert = at.expert if part.expert is None else part.expert
        module = at.last if expert is None else f"experts.{at.last}"
        module = module if part.cut is None else f"{module}.{part.cut.label}"
        found.append(Pair(part.name(name), at.layer, module, expert, part.shape(before.shape), dtype, before, after, part))
    return found


def _kind(stored: Stored) -> str:
    return layouts.kind(stored.name, stored.shape) if stored.dtype in DTYPES else ""


def _same_names(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """Name in `base` of each name in `tuned` that is there: the same, or the same under one prefix.

    A checkpoint of the decoder alone has no prefix ("h.0.attn"), one of the model with its head has ("transformer.h.0.attn").
    """
    first, second = set(base), list(tuned)
    added, dropped = Counter(_prefixes(second, first)), Counter(_prefixes(first, set(second)))
    (prefix, count), (lost, lost_count) = (
        max(found.items(), key=lambda item: (item[1], not item[0]), default=("", 0)) for found in (added, dropped)
    )
    if lost_count > count:
        return {name: name if name in first else lost + name for name in second if {name, lost + name} & first}
    return {
        name: name if name in first else name.removeprefix(prefix)
        for name in second
        if name in first or (name.startswith(prefix) and name.removeprefix(prefix) in first)
    }


def _prefixes(longer: Iterable[str], shorter: set[str]) -> Iterable[str]:
    """What stands before the names of `shorter` in each name of `longer`; "" where it is the same."""
    for name in longer:
        start = 0
        while start >= 0:
            if name[start:] in shorter:
                yield name[:start]
                break
            start = name.find(".", start) + 1 or -1


def _check_architecture(base: ModelFiles, tuned: ModelFiles, names: Mapping[str, str]) -> None:
    """Raise UserError where a linear layer of a numbered layer is in one model only or has another shape."""
    first, second = _linear(base), _linear(tuned)
    known = set(names.values())
    one_sided = [(name, tuned, base) for name in second if name not in names]
    one_sided += [(name, base, tuned) for name in first if name not in known]
    other_shape = [name for name in second if name in names and base.tensors[names[name]].shape != tuned.tensors[name].shape]
    if not one_sided and not other_shape and second:
        return
    matching = len(second) - len(other_shape) - sum(here is tuned for _, here, _ in one_sided)
    if other_shape:
        name = other_shape[0]
        shapes = list(base.tensors[names[name]].shape), list(tuned.tensors[name].shape)
        what = f"{name} is {shapes[0]} in {base.path} and {shapes[1]} in {tuned.path}"
    elif one_sided:
        name, here, there = one_sided[0]
        what = f"{name} is in {here.path} and not in {there.path}"
    else:
        what = f"{tuned.path} holds no weight of a numbered layer"
    raise UserError(
        f"two architectures: of {len(second)} weights in the layers of {tuned.path} {matching} match {base.path}; {what}; "
        "give a model and what was trained from it"
    )


def _linear(model: ModelFiles) -> list[str]:
    return [
        name
        for name, stored in model.tensors.items()
        if _kind(stored) == "matrix" and layouts.place(name).layer is not None
    ]


def _apart(pairs: list[Pair]) -> list[Pair]:
    """With as much of its path before a module's name as tells apart what one layer holds twice (attn.c_proj, mlp.c_proj)."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_name[pair.module].append(index)
    named = list(pairs)
    for module, indices in by_name.items():
        paths = [layouts.place(pairs[index].before.name).path for index in indices]
        for depth in range(1, max(map(len, paths))):
            if len({(pairs[i].layer, pairs[i].expert, named[i].module) for i in indices}) == len(indices):
                break
            for index, path in zip(indices, paths, strict=True):
                named[index] = replace(pairs[index], module=".".join([*path[-1 - depth : -1], module]))
    return named


def _chosen(found: Pairs, base: ModelFiles, layers: set[int] | None, modules: Sequence[str] | None) -> Pairs:
    pairs, left_out = found.pairs, list(found.left_out)
    if modules is None:
        tables = [pair for pair in pairs if layouts.kind(pair.before.name, pair.before.shape) != "matrix"]
        left_out += [(pair.name, f"no linear layer of the model's body; ask for it with modules {pair.module}") for pair in tables]
        pairs = [pair for pair in pairs if layouts.kind(pair.before.name, pair.before.shape) == "matrix"]
    else:
        for asked in modules:
            if not any(_asked([asked], pair.module) for pair in pairs):
                raise UserError(_no_module(asked, found, base))
        pairs = [pair for pair in pairs if _asked(modules, pair.module)]
        left_out = [(name, why) for name, why in left_out if _asked(modules, layouts.place(name.split("[")[0]).last)]
    if layers is not None:
        there = {pair.layer for pair in found.pairs if pair.layer is not None}
        if layers - there:
            raise UserError(f"no layer {min(layers - there)}; there are layers {_ranges(there)}")
        pairs = [pair for pair in pairs if pair.layer in layers]
        left_out = [(name, why) for name, why in left_out if layouts.place(name.split("[")[0]).layer in layers]
        if not pairs:
            raise UserError(f"no matrix of modules {', '.join(modules or [])} in layers {_ranges(layers)}")
    if not pairs:
        raise UserError(f"{base.path}: no weight of a linear layer to compare; name embeddings or heads in modules")
    return Pairs(sorted(pairs, key=lambda pair: (pair.layer is None, pair.layer or 0)), left_out)


def _asked(modules: Sequence[str] | None, module: str) -> bool:
    words = module.split(".")
    return any(
        asked.split(".") == words[i : i + asked.count(".") + 1] for asked in modules or () for i in range(len(words))
    )


def _no_module(asked: str, found: Pairs, base: ModelFiles) -> str:
    there = ", ".join(sorted({pair.module for pair in found.pairs}))
    why = next((why for name, why in found.left_out if layouts.place(name).last == asked), None)
    if why is None and asked in ("lm_head", "embed_out") and tied_head(base):
        why = "tied to the embedding"
    return f"modules: {asked} " + (f"cannot be compared ({why})" if why else "names no matrix") + f"; there are {there}"


def _ranges(numbers: Iterable[int]) -> str:
    """"0-5, 12"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)

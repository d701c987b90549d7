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
from calibtrain.spectral.lora_files import LowRank, open_adapter
from calibtrain.spectral.model_files import DTYPES, ModelFiles, Stored, open_model

COMPARED = ("matrix", "embedding", "head")
WHAT = {"embedding": "an embedding", "head": "the head"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight matrix before and after, still on disk."""

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
        first = first.float()
        return first, first.addmm(left, right)

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
        after = _adapter(tuned)
        names = _same_names(first.tensors, after.weights)
        _check_adapter(first, after, names)
    else:
        second = open_model(tuned)
        after, names = _whole(second), _same_names(first.tensors, second.tensors)
        _check_architecture(first, second, names)
    found = _matched(first, after, names, modules)
    return _chosen(Pairs(_apart(found.pairs), found.left_out), first, layers, modules)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    adapter, model = (path / "adapter_config.json").is_file(), (path / "config.json").is_file()
    if adapter and model and any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: holds a model and an adapter; move one of them to a directory of its own")
    return adapter


def has_tied_head(model: ModelFiles) -> bool:
    """Whether the head is the embedding: config.json says so, they share a tensor, or no head of any kind is there."""
    heads = [stored for name, stored in model.tensors.items() if layouts.place(name).last in layouts.HEADS]
    shared = any(stored in heads for name, stored in model.tensors.items() if name != stored.name)
    return not heads or shared or layouts.setting(model.settings, "tie_word_embeddings") is True


@dataclass(frozen=True, slots=True)
class _Tuned:
    path: Path
    weights: Mapping[str, Stored | LowRank]
    tied: bool
    others: str  # why a weight that only the base model has is left out


def _whole(model: ModelFiles) -> _Tuned:
    return _Tuned(model.path, model.tensors, has_tied_head(model), f"only in the base model, not in {model.path}")


def _adapter(path: Path) -> _Tuned:
    adapter = open_adapter(path)
    return _Tuned(path, {**adapter.low_rank, **adapter.whole}, False, "the adapter does not change it")


def _matched(base: ModelFiles, tuned: _Tuned, names: Mapping[str, str], modules: Sequence[str] | None) -> Pairs:
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    base_tied = has_tied_head(base)
    for name, after in tuned.weights.items():
        before = base.tensors.get(names.get(name, ""))
        kind = _kind(name, before or after)
        if not kind:
            continue
        if is_head(name) and (base_tied or tuned.tied):
            left_out.append((name, f"tied to the embedding in {base.path if base_tied else tuned.path}"))
        elif before is None:
            left_out.append((name, f"only in {tuned.path}"))
        elif kind not in COMPARED:
            left_out.append((name, kind))
        elif _full_shape(before, base) != _full_shape(after, base):
            why = _other_shape(before, after, base)
            if _asked(modules, layouts.place(name).last):
                raise UserError(f"{name}: {why}, so it cannot be compared; leave it out of modules")
            left_out.append((name, why))
        else:
            pairs += _pairs(name, kind, before, after, base)
    known = {names[name] for name in tuned.weights if name in names}
    for name, before in base.tensors.items():
        kind = _kind(name, before)
        if kind and name not in known:
            why = f"tied to the embedding in {tuned.path}" if is_head(name) and tuned.tied else tuned.others
            left_out.append((name, why if kind in COMPARED else kind))
    return Pairs(pairs, left_out)


def _full_shape(weight: Stored | LowRank, base: ModelFiles) -> tuple[int, ...]:
    """(out, in) of a 2-D weight as layers use it, the stored shape of others."""
    if isinstance(weight, LowRank) or len(weight.shape) != 2:
        return weight.shape
    in_first = layouts.parts(weight.name, weight.shape, base.settings)[0].in_first
    return weight.shape[::-1] if in_first else weight.shape


def _other_shape(before: Stored, after: Stored | LowRank, base: ModelFiles) -> str:
    old, new = list(_full_shape(before, base)), list(_full_shape(after, base))
    if old[1:] == new[1:]:
        return f"{new[0]} rows, and {old[0]} in {base.path} (a resized vocabulary)"
    return f"shape {new}, and {old} in {base.path}"


def _pairs(name: str, kind: str, before: Stored, after: Stored | LowRank, base: ModelFiles) -> list[Pair]:
    at = layouts.place(name)
    dtype = DTYPES[after.dtype] if isinstance(after, Stored) else "float32"
    found = []
    for part in layouts.parts(name, before.shape, base.settings) if kind == "matrix" else [Part()]:
        expert = at.expert if part.expert is None else part.expert
        module = at.last if expert is None else f"experts.{at.last}"
        module = module if part.cut is None else f"{module}.{part.cut.label}"
        found.append(
            Pair(part.name(name), at.layer, module, expert, part.shape(before.shape), dtype, before, after, part)
        )
    return found


def _kind(name: str, weight: Stored | LowRank) -> str:
    known = isinstance(weight, LowRank) or weight.dtype in DTYPES
    return layouts.kind(name.split("[")[0], weight.shape) if known else ""


def is_head(name: str) -> bool:
    """Whether it is a head over the vocabulary, which may be tied to the embedding."""
    return layouts.place(name).last in ("lm_head", "embed_out")


def _same_names(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """Name in `base` of each name in `tuned` that is there: the same, or the same under one prefix.

    A checkpoint of the decoder alone has no prefix ("h.0.attn"), one of the whole model has ("transformer.h.0.attn").
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
    other_shape = [
        name for name in second if name in names and base.tensors[names[name]].shape != tuned.tensors[name].shape
    ]
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


def _check_adapter(base: ModelFiles, adapter: _Tuned, names: Mapping[str, str]) -> None:
    """Raise UserError where an adapter was not made for the base model."""
    for name, change in adapter.weights.items():
        before = base.tensors.get(names.get(name, ""))
        if before is None and not (is_head(name) and has_tied_head(base)):
            what = f"changes {name}, which {base.path} does not have"
        elif (
            before is not None
            and _kind(name, before) == "matrix"
            and _full_shape(before, base) != _full_shape(change, base)
        ):
            what = f"{name} is {list(_full_shape(change, base))}, and {list(_full_shape(before, base))} in {base.path}"
        else:
            continue
        raise UserError(f"{adapter.path}: {what}; give the model that the adapter was trained on")


def _linear(model: ModelFiles) -> list[str]:
    return [
        name
        for name, stored in model.tensors.items()
        if _kind(name, stored) == "matrix" and layouts.place(name).layer is not None
    ]


def _apart(pairs: list[Pair]) -> list[Pair]:
    """Before a module's name, as much of its path as tells apart what one layer holds twice (attn.c_proj, mlp.c_proj)."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_name[pair.module].append(index)
    named = list(pairs)
    for module, indices in by_name.items():
        paths = [layouts.place(pairs[index].name.split("[")[0]).path for index in indices]
        for depth in range(1, max(map(len, paths))):
            if len({(pairs[i].layer, pairs[i].expert, named[i].module) for i in indices}) == len(indices):
                break
            for index, path in zip(indices, paths, strict=True):
                named[index] = replace(pairs[index], module=".".join([*path[-1 - depth : -1], module]))
    return named


def _chosen(found: Pairs, base: ModelFiles, layers: set[int] | None, modules: Sequence[str] | None) -> Pairs:
    pairs, left_out = found.pairs, list(found.left_out)
    if modules is None:
        pairs = [pair for pair in pairs if _kind(pair.name, pair.before) == "matrix"]
        left_out += [
            (pair.name, f"{WHAT[_kind(pair.name, pair.before)]}; name {pair.module} in modules to compare it")
            for pair in found.pairs
            if _kind(pair.name, pair.before) != "matrix"
        ]
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
    if why is None and is_head(asked) and has_tied_head(base):
        why = "tied to the embedding"
    return f"modules: {asked} " + (f"cannot be compared ({why})" if why else "names no matrix") + f"; there are {there}"


def _ranges(numbers: Iterable[int]) -> str:
    """Such as "0-5, 12"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)

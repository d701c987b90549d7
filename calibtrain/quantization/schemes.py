"""Which bits: a scheme says on what grid weights and activations lie, and which layers stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from calibtrain.errors import UserError
from calibtrain.quantization.affine import Grid

GROUP_SIZES = (128, 64, 32)
OBSERVERS = ("minmax", "percentile", "mse")
"""How the range of static activations is found (`observers`)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Weights on a grid per group of inputs or per output channel; activations on one per token, per tensor, or none."""

    name: str
    weights: Grid
    group_size: int | None = None  # inputs that share a scale; None: one scale an output channel
    activations: Grid | None = None  # None: activations stay in the model's dtype
    static: bool = False  # activations: one range for all tokens, observed beforehand; else each token has its own
    observer: str = "minmax"  # of OBSERVERS, for static activations
    kv_cache: bool = False  # keys and values in float8, static, one scale a layer

    @property
    def label(self) -> str:
        """In words: "4-bit weights in groups of 32"."""
        kind = "float8" if self.weights.floating else f"{self.weights.bits}-bit"
        where = "per output channel" if self.group_size is None else f"in groups of {self.group_size}"
        shape = "" if self.weights.symmetric else ", asymmetric"
        inputs = (
            "" if self.activations is None else f", {kind} activations {'per tensor' if self.static else 'per token'}"
        )
        return f"{kind} weights {where}{shape}{inputs}{', float8 key-value cache' if self.kv_cache else ''}"


SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme("w8a8", Grid(8), activations=Grid(8)),
    "w8a16": Scheme("w8a16", Grid(8), group_size=128),
    "w4a16": Scheme("w4a16", Grid(4), group_size=128),
    "fp8": Scheme("fp8", Grid(8, floating=True), activations=Grid(8, floating=True)),
}


def scheme_of(
    name: str,
    *,
    group_size: int | None = None,
    asymmetric: bool = False,
    static: bool = False,
    observer: str | None = None,
    kv_cache: bool = False,
) -> Scheme:
    """The named scheme with what is asked of it. Raises UserError for an unknown name and for what it cannot be."""
    if name not in SCHEMES:
        raise UserError(f"--scheme: {name!r} is none of {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    if group_size is not None:
        if scheme.group_size is None:
            raise UserError(f"--group-size: {name} has one scale an output channel; it goes with w4a16 and w8a16")
        if group_size not in GROUP_SIZES:
            raise UserError(f"--group-size: {group_size} is none of {', '.join(map(str, GROUP_SIZES))}")
        scheme = replace(scheme, group_size=group_size)
    if asymmetric:
        if scheme.group_size is None:
            raise UserError(f"--asymmetric: {name} is symmetric in every engine; it goes with w4a16 and w8a16")
        scheme = replace(scheme, weights=replace(scheme.weights, symmetric=False))
    if static:
        if scheme.activations is None:
            raise UserError(f"--static: {name} leaves activations as they are; it goes with w8a8 and fp8")
        scheme = replace(scheme, static=True)
    if observer is not None:
        if observer not in OBSERVERS:
            raise UserError(f"--observer: {observer!r} is none of {', '.join(OBSERVERS)}")
        if not static:
            raise UserError("--observer: finds the one range of all tokens; it goes with --static")
        scheme = replace(scheme, observer=observer)
    return replace(scheme, kv_cache=kv_cache)


def fit_groups(scheme: Scheme, widths: Mapping[str, int]) -> Scheme:
    """The scheme with the largest group of at most its own that divides the inputs of every layer.

    widths: inputs of each layer to be quantised, by name. One size for all, since engines fuse layers that read the same
    inputs. Raises UserError that names a layer which no group divides.
    """
    if scheme.group_size is None:
        return scheme
    sizes = [size for size in GROUP_SIZES if size <= scheme.group_size]
    for size in sizes:
        if all(width % size == 0 for width in widths.values()):
            return replace(scheme, group_size=size)
    name, width = next((name, width) for name, width in widths.items() if width % sizes[-1])
    raise UserError(
        f"{name}: no group of {' or '.join(map(str, sizes))} divides its {width} inputs; leave it as it is with "
        f"--ignore {name.rpartition('.')[2]}, or take w8a8, which has one scale an output channel"
    )


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a layer stays in full precision: it has one of these names, or the name ends with it, or "re:" matches it."""
    return any(
        re.fullmatch(one[3:], name) is not None if one.startswith("re:") else name == one or name.endswith(f".{one}")
        for one in ignore
    )

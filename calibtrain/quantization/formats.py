"""How compressed-tensors stores one quantised layer, and the quantization_config that says so. Its own functions do both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.models.quantized import require_compressed_tensors
from calibtrain.quantization.affine import Grid, QuantizedWeight
from calibtrain.quantization.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Packing:
    """Tensors of one layer in the file, and back."""

    scheme: Scheme
    name: str  # as compressed-tensors calls the format
    keys: tuple[str, ...]

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight, or weight_packed (int32), weight_shape and weight_zero_point; and weight_scale in the model's dtype."""
        scale = weight.scale.to(weight.dtype)
        if self.name != "pack-quantized":
            return {"weight": weight.values, "weight_scale": scale}
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits = weight.grid.bits
        tensors = {
            "weight_packed": pack_to_int32(weight.values, bits),
            "weight_shape": torch.tensor(weight.values.shape),
            "weight_scale": scale,
        }
        if not weight.grid.symmetric:
            tensors["weight_zero_point"] = pack_to_int32(weight.zero.to(torch.int8), bits, packed_dim=0)
        return tensors

    def unpack(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """What `pack` was given."""
        grid, scale = self.scheme.weights, tensors["weight_scale"]
        zero = torch.zeros(scale.shape)
        if self.name != "pack-quantized":
            values = tensors["weight"]
        else:
            from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

            shape = torch.Size(tensors["weight_shape"].tolist())
            values = unpack_from_int32(tensors["weight_packed"], grid.bits, shape).contiguous()
            if not grid.symmetric:
                packed = tensors["weight_zero_point"]
                zero = unpack_from_int32(packed, grid.bits, scale.shape, packed_dim=0).float().contiguous()
        return QuantizedWeight(values, scale.float(), zero, grid, self.scheme.group_size, scale.dtype)


def packing_of(scheme: Scheme) -> Packing:
    """How a scheme's weights are stored. Raises UserError without compressed-tensors, and for what no reader reads."""
    require_compressed_tensors()
    if scheme.kv_cache and not scheme.weights.symmetric:
        raise UserError(
            "--asymmetric: transformers reads it only by giving up a quantised key-value cache; leave out one of the two"
        )
    if scheme.activations is not None:
        name = "float-quantized" if scheme.weights.floating else "int-quantized"
        return Packing(scheme, name, ("weight", "weight_scale"))
    keys = ("weight_packed", "weight_shape", "weight_scale")
    return Packing(scheme, "pack-quantized", keys if scheme.weights.symmetric else (*keys, "weight_zero_point"))


def quantization_config(scheme: Scheme, ignored: list[str]) -> dict[str, Any]:
    """The entry of config.json, as compressed-tensors writes it; `ignored` are layers in full precision."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    weights: dict[str, Any] = {"strategy": "channel", "observer": None}
    if scheme.group_size is not None:
        weights = {"strategy": "group", "group_size": scheme.group_size, "observer": None}
    inputs = None
    if scheme.activations is not None:
        where = {"strategy": "tensor", "dynamic": False} if scheme.static else {"strategy": "token", "dynamic": True}
        inputs = _arguments(scheme.activations, **where, observer=None)
    cache = Grid(8, floating=True)
    name = packing_of(scheme).name
    group = QuantizationScheme(
        targets=["Linear"], weights=_arguments(scheme.weights, **weights), input_activations=inputs, format=name
    )
    config = QuantizationConfig(
        config_groups={"group_0": group},
        kv_cache_scheme=_arguments(cache, strategy="tensor", dynamic=False, observer=None) if scheme.kv_cache else None,
        format=name,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    )
    entry: dict[str, Any] = {"version": __version__, **config.model_dump(mode="json")}
    if scheme.activations is None and not scheme.kv_cache:
        # transformers then makes dense weights while it reads. Its other way, which unpacks them before the first use,
        # expects zero points that are not packed, whereas every file of this format has them packed.
        entry["dequantize"] = True
    return entry


def _arguments(grid: Grid, **settings: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=grid.bits, type="float" if grid.floating else "int", symmetric=grid.symmetric, **settings
    )

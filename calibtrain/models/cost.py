"""What a model costs to train: products a token, counted from its shapes, and what devices can do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from calibtrain.models.sharding import full_shape


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks as the makers state them for dense products; FLOP/s, bytes/s."""

    bf16: float
    fp32: float  # as torch multiplies by default, without TF32
    memory: float


DEVICES = {
    "a100": Device(312e12, 19.5e12, 2.0e12),
    "h100": Device(989e12, 67e12, 3.35e12),
    "h200": Device(989e12, 67e12, 4.8e12),
    "b200": Device(2250e12, 75e12, 8.0e12),
    "l40s": Device(362e12, 91.6e12, 0.864e12),
    "l4": Device(121e12, 30.3e12, 0.3e12),
    "a10": Device(125e12, 31.2e12, 0.6e12),
    "mi300x": Device(1307e12, 163e12, 5.3e12),
}
"""By the part of the device's name that tells it."""


def device_of(name: str) -> Device | None:
    """The device of a name such as "NVIDIA H100 80GB HBM3"; None for one that is not known. Longer names win."""
    words = name.lower().replace("-", " ").split()
    found = [key for key in sorted(DEVICES, key=len, reverse=True) if key in words]
    return DEVICES[found[0]] if found else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Products a second of this device as its maker states them; None where that is not known, as for any CPU."""
    found = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if found is None else (found.bf16 if dtype == torch.bfloat16 else found.fp32)


@dataclass(frozen=True, slots=True)
class Work:
    """Weights that multiply a token, and the width of attention: floating-point operations follow from these."""

    body: int  # elements of matrices that each token passes, without embeddings and head
    learns: int  # of them those that are trained
    head: int  # elements of the head, which target tokens pass
    attention: int  # layers x heads x size of a head
    head_learns: bool = True

    def forward(self, tokens: float, targets: float, attended: float) -> float:
        """Operations of a forward pass. `attended`: over tokens, how many each attends to, itself included."""
        return 2 * self.body * tokens + 2 * self.head * targets + 4 * self.attention * attended

    def step(self, tokens: float, targets: float, attended: float) -> float:
        """Of forward and backward, as a model's FLOPs are counted for MFU: what is computed twice counts once."""
        whole = self.forward(tokens, targets, attended)
        inputs = 2 * self.body * tokens + 2 * self.head * targets + 2 * 4 * self.attention * attended
        weights = 2 * self.learns * tokens + 2 * self.head * self.head_learns * targets
        return whole + inputs + weights


def work_of(model: Any, names: Iterable[tuple[str, Any]] | None = None) -> Work:
    """Of a causal language model, also on the meta device or in parts under ZeRO-3 (whose parameters know their shape).

    Of experts each token passes `num_experts_per_tok`. Embeddings multiply nothing; tied to the head, they are the head.
    """
    settings = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tables = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    experts = getattr(settings, "num_experts", None) or getattr(settings, "num_local_experts", None)
    share = (getattr(settings, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    body = learns = 0.0
    for name, parameter in names or model.named_parameters():
        shape = full_shape(parameter)
        if id(parameter) in tables or len(shape) < 2:
            continue
        elements = shape.numel() * (share if ".experts." in name else 1.0)
        body += elements
        learns += elements * parameter.requires_grad
    heads = int(getattr(settings, "num_attention_heads", None) or 0)  # some models have no attention
    size = int(getattr(settings, "head_dim", None) or (settings.hidden_size // heads if heads else 0))
    table = 0 if head is None else full_shape(head.weight).numel()
    trains = head is not None and head.weight.requires_grad
    return Work(int(body), int(learns), table, int(settings.num_hidden_layers) * heads * size, trains)


def causal(lengths: Iterable[int]) -> float:
    """`attended` of sequences of these lengths, each token to itself and those before it."""
    return sum(length * (length + 1) / 2 for length in lengths)

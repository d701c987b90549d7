"""What a run holds in memory, phase by phase, from the shapes of its model: nothing is allocated or read but config.json.

The states of training are counted (parameters, gradients, optimizer), and so are activations: the model runs with fake
tensors at one and at two layers, and what autograd saves is added up. Assumed are the buffers that stand beside: those of
DeepSpeed, and those of the layer whose backward pass runs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibtrain.attention_names import told_by_length
from calibtrain.config import ModelConfig, RunConfig
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import settled, torch_dtype
from calibtrain.models.cost import Work, work_of
from calibtrain.models.four_bit import SCALE_BYTES, is_four_bit, packed_layers
from calibtrain.models.streamed_export import FILE_BYTES
from calibtrain.training.deepspeed_config import BUCKET_ELEMENTS, BatchPlan
from calibtrain.training.eight_bit import LONGEST, MOMENT_BYTES, in_eight_bits, is_eight_bit

DEVICE, HOST, SAVED = "device", "host memory", "saved"
LIVE_PARAMETERS = 1_000_000_000
"""So many elements of ZeRO-3's gathered parameters DeepSpeed keeps, unless its JSON has stage3_max_live_parameters."""
NOT_HELD = "logits and their gradient, not held"

Held = dict[str, tuple[int, str]]
"""What -> (bytes on each rank, DEVICE, HOST or SAVED)."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What memory depends on."""

    parameters: int
    trainable: int
    vocabulary: int
    hidden_size: int | None
    rewards: int = 0  # parameters of reward models beside it
    starting: int = 0  # parameters of the frozen starting model that a KL is measured from
    largest: int = 0  # elements of the largest parameter
    cached: int = 0  # elements that a token leaves in the key-value cache
    layers: int = 0
    intermediate_size: int = 0
    work: Work | None = None
    packed: int = 0  # of the parameters, those that are held in four bits while training
    large: int = 0  # of the trained ones, those whose moments an optimizer of eight bits packs

    def bytes_in_training(self, width: int, ranks: int = 1) -> int:
        """Of the parameters on each of `ranks` that share them: `width` bytes each, but for those in four bits.

        DeepSpeed cuts what is packed, not the scales beside it.
        """
        return ((self.parameters - self.packed) * width + self.packed // 2) // ranks + round(self.packed * SCALE_BYTES)

    def bytes_of_moments(self, config: RunConfig) -> int:
        """Of both moments of all trained parameters."""
        packed = self.large if is_eight_bit(config.training) else 0
        return 8 * (self.trainable - packed) + round(MOMENT_BYTES * packed)


def model_size(config: RunConfig) -> ModelSize:
    """Count the parameters on the meta device: nothing is allocated, tied weights count once.

    A value model's are among them; those of reward models and of a frozen starting model stand beside. Raises UserError when
    a model's config.json is not at hand, or adapters fit no layer.
    """
    from calibtrain.models.reward_scorer import reward_parameters
    from calibtrain.models.value import value_config
    from calibtrain.training.reward_sources import models_of

    size = _size_of(config.model)
    if config.objective.needs.reference == "live" and config.model.lora is None:
        size = replace(size, starting=size.parameters)
    if config.objective.needs.module == "value model":
        value = _size_of(value_config(config))
        size = replace(
            size,
            parameters=size.parameters + value.parameters,
            trainable=size.trainable + value.trainable,
            packed=size.packed + value.packed,
            large=size.large + value.large,
        )
    if config.trains_on_rollouts:
        size = replace(size, rewards=sum(reward_parameters(source, key) for key, source in models_of(config)))
    return size


def _size_of(config: ModelConfig) -> ModelSize:
    from calibtrain.models.adapters import add_adapter, add_lora
    from calibtrain.models.loading import described_model

    model = described_model(config)
    parameters = [parameter.numel() for parameter in model.parameters()]
    packed = packed_layers(model) if is_four_bit(config) else []
    in_four_bits = sum(layer.weight.numel() for layer in packed)
    text = model.config.get_text_config()
    model = add_adapter(add_lora(model, config), config, find_bases=False)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    heads = int(getattr(text, "num_attention_heads", None) or 0)  # some models have no attention
    width = int(getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0))
    layers = int(text.num_hidden_layers)
    return ModelSize(
        sum(parameters),
        trainable,
        int(text.vocab_size),
        getattr(text, "hidden_size", None),
        largest=max(parameters),
        cached=2 * layers * int(getattr(text, "num_key_value_heads", None) or heads) * width,
        layers=layers,
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        work=work_of(model),
        packed=in_four_bits,
        large=sum(parameter.numel() for parameter in in_eight_bits(model)),
    )


def width_of(config: RunConfig) -> int:
    """Bytes of a parameter in the forward pass."""
    return 2 if settled(config).model.dtype == "bf16" else 4


def memory_estimate(config: RunConfig, size: ModelSize, plan: BatchPlan) -> Held:
    """The states of training, on each rank, and the logits that are never held."""
    training, world, width = config.training, plan.world_size, width_of(config)
    stage = training.zero_stage
    accumulated = 4 if stage >= 2 else width
    master = 4 if width == 2 or stage else 0  # ZeRO keeps its flat fp32 copy in fp32 training, too
    sequences = plan.micro_batch_size * config.sequences_per_record
    logits = sequences * config.data.max_length * size.vocabulary * 4 // plan.sequence_parallel_size
    rewards = size.rewards * width // (world if stage == 3 else 1)
    return {
        "parameters": (
            size.bytes_in_training(width, world if stage == 3 else 1),
            HOST if training.offload_parameters else DEVICE,
        ),
        "gradients": (size.trainable * accumulated // (world if stage >= 2 else 1), DEVICE),
        "optimizer states (fp32 master, two moments)": (
            (size.trainable * master + size.bytes_of_moments(config)) // (world if stage >= 1 else 1),
            HOST if training.offload_optimizer else DEVICE,
        ),
        **_unpacked(config, size, world),
        **(
            {"starting model": (size.starting * width // (world if stage == 3 else 1), DEVICE)} if size.starting else {}
        ),
        **({"reward models": (rewards, DEVICE)} if rewards else {}),
        **(
            {"averaged weights": (size.trainable * 4 // world, HOST if training.offload_parameters else DEVICE)}
            if training.average_last
            else {}
        ),
        NOT_HELD: (2 * logits, SAVED),
    }


def _unpacked(config: RunConfig, size: ModelSize, world: int) -> Held:
    """On a host bitsandbytes unpacks what it updates, a group of parameters at a time; on a GPU within its kernels."""
    if not (is_eight_bit(config.training) and config.training.offload_optimizer):
        return {}
    return {"moments, unpacked for their update": (12 * min(size.large, LONGEST) // world, HOST)}


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that autograd saves of one row of `length` tokens."""

    length: int
    layer: int  # by each layer
    rest: int  # beside the layers
    boundary: int  # what passes from one layer to the next

    def of(self, rows: int, layers: int, *, checkpointing: bool) -> int:
        """Of so many rows at the end of a forward pass; with checkpointing, at the deepest point of the backward pass."""
        held = layers * self.boundary + self.layer if checkpointing else layers * self.layer
        return rows * (held + self.rest)


def activations(config: RunConfig, length: int) -> Activations:
    """Count what a row more saves in a forward pass, with attention that never holds its scores, in the config's dtype.

    Raises UserError where the architecture cannot be run without weights.
    """
    model, several = settled(config).model, config.packing_tokens is not None or config.shares_prompts
    masked = several and not told_by_length(model.attention)
    sizes = {size for shape in _shapes(config.model) for size in shape}
    # Of a single row some tensors are views of others; and a weight must not look like the tokens of all rows.
    rows = next(n for n in itertools.count(2) if not {n * length, (n + 1) * length} & sizes)

    def of_a_row(layers: int) -> int:
        fewer, more = (saved_bytes(model, n, length, layers, masked=masked) for n in (rows, rows + 1))
        return more - fewer

    one, two = of_a_row(1), of_a_row(2)
    hidden = int(_settings(config.model, 1).get_text_config().hidden_size)
    return Activations(length, two - one, max(0, 2 * one - two), length * hidden * width_of(config))


def _shapes(config: ModelConfig) -> set[torch.Size]:
    """Of the parameters of one layer and of what stands around the layers."""
    from transformers import AutoModelForCausalLM

    settings = _settings(config, 1)  # not on the meta device: the embedded model may have to be unpacked for it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    return {parameter.shape for parameter in model.parameters()}


def _settings(config: ModelConfig, layers: int) -> Any:
    from calibtrain.models.loading import load_settings

    settings = copy.deepcopy(load_settings(config))
    text = settings.get_text_config()
    for key, value in vars(text).copy().items():
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:layers])  # a kind for each layer
    text.num_hidden_layers = layers
    return settings


def saved_bytes(config: ModelConfig, rows: int, length: int, layers: int, *, masked: bool = False) -> int:
    """Bytes that autograd keeps of a forward pass through so many layers of the model, without its head.

    `masked`: rows hold several sequences, so that attention is given a mask, and keys and values for every head.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    from calibtrain.models.adapters import add_adapter, add_lora

    plain = config.model_copy(update={"gradient_checkpointing": False, "compile": False})
    attention = "eager" if config.attention == "eager" else "sdpa"
    settings = _settings(config, layers)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=torch_dtype(config),
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            )
        model = add_adapter(add_lora(model, plain), plain, find_bases=False).train()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with FakeTensorMode():  # on a device that is there: on meta itself attention would hold its scores
            _place(model)
            with counted(model) as seen, _without_mask(masked):
                inner.base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    except UserError:
        raise
    except Exception as error:
        why = f"its activations cannot be counted without weights: {error}"
        raise UserError(f"model.source: {config.source}: {why}") from None
    return sum(seen.values())


@contextlib.contextmanager
def _without_mask(masked: bool) -> Iterator[None]:
    """Transformers looks into positions for several sequences in a row, and takes fake ones for such: here it is told."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    known = getattr(masking_utils, name, None)
    if masked or known is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, known)


def _place(model: torch.nn.Module) -> None:
    """Empty tensors in the place of those on the meta device, tied ones once."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None and id(one) not in made:
                made[id(one)] = torch.nn.Parameter(torch.empty(one.shape, dtype=one.dtype), one.requires_grad)
            module._parameters[name] = None if one is None else made[id(one)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


class counted:
    """Within it, bytes of each storage that autograd saves, beside the model's parameters: storage -> bytes.

    Parameters are told by their storage, and by their shape: of fake tensors another object may be saved.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {parameter.shape for parameter in model.parameters()}
        self._own |= {torch.Size(reversed(shape)) for shape in self._own}
        self._places = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: list[Any] = []  # so that no storage takes the place of another
        self.seen: dict[int, int] = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        own = storage._cdata in self._places or (tensor.ndim <= 2 and tensor.shape in self._own)
        if not own and storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage.nbytes()
            self._kept.append(storage)
        return tensor

    def __enter__(self) -> dict[int, int]:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self.seen

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def phases(config: RunConfig, size: ModelSize, plan: BatchPlan, saved: Activations) -> dict[str, Held]:
    """What each rank holds while it loads, trains, answers and exports; evaluating, on as many ranks (--num-processes).

    Rows are as long as they may be (packing_tokens, else data.max_length), so that nothing is larger in training.
    """
    training, width, world = config.training, width_of(config), plan.world_size
    whole = size.parameters * width
    sharded = training.zero_stage == 3
    own = whole // world if sharded else whole
    states = {name: held for name, held in memory_estimate(config, size, plan).items() if held[1] != SAVED}
    buffers = {**_buffers(config, size, world), "CUDA context and libraries": (2**30, DEVICE)}
    answering = _answering(config, size, width)
    gathered: Held = {"a layer, gathered": (size.largest * width, DEVICE)} if sharded else {}
    # In four bits each rank packs the whole model, weight by weight on its device, before it is cut.
    held = size.bytes_in_training(width) if size.packed else own
    loading: Held = {"parameters": (held, HOST if training.offload_parameters and not size.packed else DEVICE)}
    loading["weights on their way"] = (size.largest * width if sharded or size.packed else whole, HOST)
    return {
        "loading": loading,
        "training": {**states, **buffers, **_of_a_step(config, size, plan, saved)},
        "answering while training": {**states, **buffers, **answering},
        "evaluating": {"parameters": (own, DEVICE), **gathered, **answering},
        "export": {**states, "a file on its way, on rank 0": (min(2 * whole, 2 * FILE_BYTES), HOST)},
    }


def _of_a_step(config: RunConfig, size: ModelSize, plan: BatchPlan, saved: Activations) -> Held:
    width, rows = width_of(config), rows_of(config, plan)
    # Ranks that share rows hold 1/N of their positions; in attention, of their heads.
    tokens, hidden = rows * saved.length // plan.sequence_parallel_size, size.hidden_size or 0
    held = saved.of(rows, size.layers, checkpointing=config.model.gradient_checkpointing) // plan.sequence_parallel_size
    return {
        "activations": (held, DEVICE),
        "hidden states of the head and their gradient": (2 * tokens * hidden * width, DEVICE),
        "gradients within one layer": (tokens * (2 * size.intermediate_size + 4 * hidden) * width, DEVICE),
    }


def rows_of(config: RunConfig, plan: BatchPlan) -> int:
    """Rows of a micro-batch, as many as there can be: one a sequence; packed, as few as hold them at full length."""
    sequences = plan.micro_batch_size * config.sequences_per_record
    if config.packing_tokens is None:
        return sequences
    return -(-sequences // (config.packing_tokens // config.data.max_length))


def _buffers(config: RunConfig, size: ModelSize, world: int) -> Held:
    """DeepSpeed's own: gradients on their way, and of ZeRO-3 the parameters that are gathered at one time."""
    stage, width = config.training.zero_stage, width_of(config)
    if stage == 0 or world == 1:
        return {}
    found: Held = {"gradients on their way": (2 * BUCKET_ELEMENTS * (4 if stage >= 2 else width), DEVICE)}
    if stage == 3:
        live = max(_live(config), 2 * size.largest) * width
        found["gathered parameters"] = (min(size.bytes_in_training(width), live), DEVICE)
    return found


def _live(config: RunConfig) -> int:
    path = config.training.deepspeed
    try:
        values: Mapping[str, Any] = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        return int(values.get("zero_optimization", {}).get("stage3_max_live_parameters", LIVE_PARAMETERS))
    except (OSError, ValueError, AttributeError):
        return LIVE_PARAMETERS


def _answering(config: RunConfig, size: ModelSize, width: int) -> Held:
    asked, tokens = config.evaluation.batch_size, config.data.max_length
    return {
        "keys and values": (asked * tokens * size.cached * width, DEVICE),
        "logits of one place": (2 * asked * size.vocabulary * 4, DEVICE),
    }


def total(held: Held, where: str) -> int:
    """Bytes there."""
    return sum(count for count, place in held.values() if place == where)

"""Weights in parts on the ranks (ZeRO-3): making the parts, reading them whole a layer at a time, and running on them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Read = Callable[[int, int], Tensor]
"""Elements start to end of a row-major flat weight."""


def full_shape(parameter: Any) -> torch.Size:
    """Shape of a weight as the model has it, also of one that lies in parts, whose own shape is (0,), or in four bits."""
    packed = getattr(parameter, "quant_state", None)
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape)


def is_sharded(parameter: Any) -> bool:
    """Whether a weight lies in parts on the ranks."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """Within, `parameters` are whole on every rank, to be read; what is written is lost. Collective if they lie in parts."""
    parts = list(dict.fromkeys(one for one in parameters if is_sharded(one)))
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


@contextmanager
def unsharded(find: Callable[[], Iterable[nn.Module]]) -> Iterator[None]:
    """Within, the weights of the layers of `find()` are plain ones of each rank's own, for all ranks to change alike.

    Whatever weights those layers, found again, have afterwards are rank 0's, in parts again. Collective; where none lies in
    parts nothing is done.
    """
    held = [(layer, name, one) for layer in find() for name, one in layer.named_parameters(recurse=False)]
    if not any(is_sharded(one) for _, _, one in held):
        yield
        return
    convert: Any = held[0][2].convert_to_zero_parameters  # type: ignore[attr-defined]
    with gathered(one for _, _, one in held):
        whole = {one: nn.Parameter(one.detach().clone(), one.requires_grad) for _, _, one in held}
    for layer, name, one in held:
        layer._parameters[name] = whole[one]
    yield
    convert(param_list=list(dict.fromkeys(one for layer in find() for one in layer.parameters(recurse=False))))


class Partition:
    """Makes weights that lie in parts from the start: no rank ever holds one whole.

    `zero` is the DeepSpeed config that the engine gets (`deepspeed_dict`), or one of `inference_settings`. Of `zero.Init` it
    takes what makes the parts: as a context it would make each weight whole, send it around, and change dtypes of buffers.
    """

    def __init__(self, zero: dict[str, Any]) -> None:
        import deepspeed

        self.init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(zero))

    @property
    def device(self) -> torch.device:
        """Where weights are brought to, to compute with them."""
        return torch.device(self.init.local_device)

    def parameter(self, like: nn.Parameter, dtype: torch.dtype, read: Read) -> nn.Parameter:
        """A weight of the shape of `like` (which may be on the meta device), of which this rank reads its part alone."""
        kind = dtype if like.is_floating_point() else like.dtype
        made: Any = nn.Parameter(torch.empty(like.shape, dtype=kind, device=self.device), like.requires_grad)
        made.__dict__.update(like.__dict__)
        self.init._convert_to_deepspeed_param(made)
        made.partition()  # of memory that nobody has touched: on a CPU it costs nothing
        part = made.ds_tensor
        start = min(made.ds_numel, part.ds_numel * made.ds_zero_partition_rank)
        end = min(made.ds_numel, start + part.ds_numel)
        part.data[: end - start].copy_(read(start, end))
        part.data[end - start :].zero_()
        return made


def inference_settings(dtype: torch.dtype, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    """A DeepSpeed config to run a model in parts without an optimiser; `zero`: a section `zero_optimization` of stage 3."""
    ours = {key: value for key, value in (zero or {}).items() if not key.startswith("offload_optimizer")}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**ours, "stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": None,
    }


def run_sharded(model: Any, dtype: torch.dtype, zero: dict[str, Any] | None = None) -> Any:
    """DeepSpeed's engine without an optimiser around a model: its weights lie in parts, and come a layer at a time.

    Every rank must run as many passes. `zero` as in `inference_settings`. Collective.
    """
    import deepspeed

    settings = inference_settings(dtype, zero)
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    return engine


def let_go(engine: Any) -> None:
    """Free the memory of what `run_sharded` made: DeepSpeed's hooks and the model refer to each other. Collective."""
    engine.empty_partition_cache()
    engine.destroy()
    for one in engine.module.parameters():
        one.data, one.ds_tensor.data = one.data.new_empty(0), one.ds_tensor.data.new_empty(0)
    gc.collect()


def replace_parameters(model: nn.Module, made: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Put each second of the pairs wherever a model has the first; tied weights stay tied."""
    new = dict(made)
    for module in model.modules():
        for name, one in module._parameters.items():
            if one in new:
                module._parameters[name] = new[one]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made within have parameters without memory; their buffers, which no file holds, are as they make them."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def part_range(parameter: Any) -> tuple[int, int]:
    """(start, stop) of this rank's part of a weight that lies in parts, in the row-major flat weight, without padding."""
    each = int(parameter.ds_tensor.ds_numel)
    start = min(int(parameter.ds_numel), each * dist.get_rank(group=parameter.ds_process_group))
    return start, min(start + each, int(parameter.ds_numel))

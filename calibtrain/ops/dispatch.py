"""Which implementation of the ops runs: one rule, and CALIBTRAIN_OPS to overrule it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from calibtrain.errors import UserError

PATHS = ("reference", "torch", "cpp", "triton")
VARIABLE = "CALIBTRAIN_OPS"


def ops_path(hidden: Tensor) -> str:
    """Implementation for inputs like `hidden`: "reference", "torch", "cpp" or "triton".

    Triton on CUDA, the compiled kernel on CPUs, PyTorch elsewhere and for the dtypes that these two leave out. The
    environment variable CALIBTRAIN_OPS names one of them for every call.

    Raises:
        UserError: the variable names none, or one that cannot take these inputs.
    """
    forced = os.environ.get(VARIABLE, "")
    device, dtype = hidden.device.type, hidden.dtype
    if not forced:
        if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
            return "cpp"
        if device == "cuda" and dtype != torch.float64 and _has_triton():
            return "triton"
        return "torch"
    if forced not in PATHS:
        raise UserError(f"{VARIABLE}={forced}: expected one of {', '.join(PATHS)}, or nothing to let the inputs decide")
    if forced == "cpp" and (device != "cpu" or dtype not in (torch.float32, torch.bfloat16)):
        raise UserError(f"{VARIABLE}=cpp takes float32 and bfloat16 on CPUs, got {dtype} on {device}: unset it")
    if forced == "triton" and not _has_triton():
        raise UserError(f"{VARIABLE}=triton: Triton is not installed: install it (pip install triton), or unset it")
    if forced == "triton" and (dtype == torch.float64 or (device != "cuda" and not os.environ.get("TRITON_INTERPRET"))):
        raise UserError(f"{VARIABLE}=triton takes float32 and 16-bit inputs on CUDA, got {dtype} on {device}: unset it")
    return forced


def triton_kernels() -> ModuleType:
    """The module of the launches in Triton; imported here alone, where `ops_path` says "triton"."""
    return import_module("calibtrain.ops.triton_token_stats")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

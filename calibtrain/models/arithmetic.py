"""In which dtype a machine trains fastest: known by its instruction set, so that all ranks and every restart agree."""

from __future__ import annotations

import logging
import os
import platform
from functools import cache
from typing import Literal

import torch

from calibtrain.config import ModelConfig, RunConfig

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

FAST_BF16 = ("amx_bf16", "avx512_bf16", "arm_bf16")
"""CPUs that multiply bf16 matrices faster than fp32 ones; the others widen every number first, ten times as slow."""
ONEDNN_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT")
"""Values of ONEDNN_MAX_CPU_ISA that leave oneDNN, which multiplies for torch, its bf16 instructions (or prefixes)."""


@cache
def instruction_set() -> str:
    """What multiplies matrices here: `cuda_sm90`, `amx_bf16`, `avx512_bf16`, `avx512`, `avx2`, `arm_bf16` or less."""
    if torch.cuda.is_available():
        return "cuda_sm{}{}".format(*torch.cuda.get_device_capability())
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return "arm_bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "arm"
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper().startswith(ONEDNN_WITH_BF16):
        found = torch.cpu.get_capabilities()
        for name in ("amx_bf16", "avx512_bf16"):
            if found.get(name):
                return name
    return torch.backends.cpu.get_cpu_capability().lower()


def dtype_name(config: ModelConfig) -> Literal["bf16", "fp32"]:
    """The config's dtype; for `auto` bf16 where this machine has instructions for it, else fp32."""
    if config.dtype != "auto":
        return config.dtype
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if instruction_set() in FAST_BF16 else "fp32"


def torch_dtype(config: ModelConfig) -> torch.dtype:
    """The config's dtype as torch names it."""
    return DTYPES[dtype_name(config)]


def settled(config: RunConfig) -> RunConfig:
    """The config with `model.dtype: auto` replaced by what this machine takes, as it is recorded in the run."""
    if config.model.dtype != "auto":
        return config
    # ZeRO-0 refuses bf16 (see RunConfig).
    dtype = "fp32" if config.training.zero_stage == 0 else dtype_name(config.model)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def told(config: RunConfig) -> str:
    """One line on what `auto` takes here and why."""
    dtype, machine = settled(config).model.dtype, instruction_set()
    if config.training.zero_stage == 0:
        return f"model.dtype: auto takes {dtype}: training.zero_stage is 0"
    reason = "has bf16 instructions" if dtype == "bf16" else "has no bf16 instructions, it would be ten times as slow"
    return f"model.dtype: auto takes {dtype}: this machine ({machine}) {reason}"

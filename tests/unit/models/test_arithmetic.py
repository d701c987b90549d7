"""`model.dtype: auto`: what each processor takes, and that a run records it."""

import pytest
import torch

from calibtrain.config import ModelConfig, RunConfig
from calibtrain.models import arithmetic
from calibtrain.models.loading import load_model
from calibtrain.training.deepspeed_config import deepspeed_dict
from tests.tiny import write_tiny_model

FLAGS = {
    "amx_bf16": {"amx_bf16": True, "avx512_bf16": True, "avx2": True},
    "avx512_bf16": {"amx_bf16": False, "avx512_bf16": True},
    "avx512": {"avx512_bf16": False},
    "avx2": {"avx2": True},
}


@pytest.fixture
def processor(monkeypatch):
    """Pretend that this is a processor of that kind; `ceiling` is ONEDNN_MAX_CPU_ISA."""

    def pretend(kind, ceiling=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(arithmetic.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: FLAGS[kind])
        below = "AVX2" if kind == "avx2" else "AVX512"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: below)
        if ceiling is None:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        else:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", ceiling)
        arithmetic.instruction_set.cache_clear()

    yield pretend
    arithmetic.instruction_set.cache_clear()


@pytest.mark.parametrize(
    ("kind", "ceiling", "instructions", "dtype"),
    [
        ("amx_bf16", None, "amx_bf16", "bf16"),
        ("avx512_bf16", None, "avx512_bf16", "bf16"),
        ("avx512", None, "avx512", "fp32"),
        ("avx2", None, "avx2", "fp32"),
        ("amx_bf16", "AVX2", "avx512", "fp32"),  # oneDNN may not use what the processor has
        ("amx_bf16", "AVX512_CORE_AMX", "amx_bf16", "bf16"),
    ],
)
def test_bf16_where_there_are_instructions_for_it(processor, kind, ceiling, instructions, dtype):
    processor(kind, ceiling)
    config = arithmetic.settled(RunConfig())
    assert (arithmetic.instruction_set(), config.model.dtype) == (instructions, dtype)
    assert deepspeed_dict(RunConfig(), 1)["bf16"]["enabled"] == (dtype == "bf16")
    assert f"takes {dtype}" in arithmetic.told(RunConfig())
    assert instructions in arithmetic.told(RunConfig())


def test_what_the_user_says_stands(processor):
    processor("avx2")
    config = RunConfig.model_validate({"model": {"dtype": "bf16"}})
    assert arithmetic.settled(config) is config


def test_zero_0_takes_fp32_everywhere(processor):
    processor("amx_bf16")
    config = RunConfig.model_validate({"training": {"zero_stage": 0}})
    assert arithmetic.settled(config).model.dtype == "fp32"
    assert "zero_stage is 0" in arithmetic.told(config)


@pytest.mark.parametrize(("kind", "dtype"), [("avx2", torch.float32), ("amx_bf16", torch.bfloat16)])
def test_a_model_is_loaded_in_it(processor, tmp_path, kind, dtype):
    processor(kind)
    write_tiny_model(tmp_path)
    assert load_model(ModelConfig(source=str(tmp_path))).dtype == dtype

"""Whether TF32 is allowed is read by torch's new setting or its old one: torch raises where both are used."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from calibtrain.ops import triton_token_stats

SETTINGS = {
    "pass": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')": False,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "from transformers.utils.import_utils import enable_tf32; enable_tf32(True)": True,
}
# A process of its own: the settings are of the whole process, and torch remembers which of the two was used.
SCRIPT = """
import sys, os, torch
from calibtrain.ops.triton_token_stats import tf32_allowed
for setting in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(setting)
        print(setting, tf32_allowed(), sep=" -> ", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_either_setting_is_read():
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *SETTINGS], capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines() == [f"{one} -> {allowed}" for one, allowed in SETTINGS.items()], ended.stderr


@pytest.mark.parametrize("allowed", [False, True])
def test_a_torch_without_the_new_setting_is_read_by_the_old(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
    assert triton_token_stats.tf32_allowed() is allowed

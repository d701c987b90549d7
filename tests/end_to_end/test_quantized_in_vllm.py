"""Real vLLM loads the directories that are written here, and answers as our own loading of them does."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibtrain.config import ModelConfig
from calibtrain.models.loading import load_model
from calibtrain.quantization.schemes import scheme_of
from tests.distributed.ranks import ROOT
from tests.quantized import write_quantized
from tests.serving import ENVIRONMENT, PYTHON, needs_vllm
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.engine, needs_vllm, pytest.mark.timeout(900)]

SCHEMES = {
    "w8a8": scheme_of("w8a8"),
    "w8a8-static": scheme_of("w8a8", static=True),
    "w8a16": scheme_of("w8a16", group_size=32),
    "w4a16-32": scheme_of("w4a16", group_size=32),
    "w4a16-64": scheme_of("w4a16", group_size=64),
    "w4a16-128": scheme_of("w4a16"),
    "w4a16-32-asymmetric": scheme_of("w4a16", group_size=32, asymmetric=True),
    "w4a16-64-asymmetric": scheme_of("w4a16", group_size=64, asymmetric=True),
    "fp8": scheme_of("fp8"),
}
NOT_BUILT = ("cpu_gemm_wna16", "Failed to find a kernel", "not supported", "Unsupported")
"""What vLLM says of a scheme that its CPU build, or this CPU, has no kernel for."""
LOGPROB = {"w8a8": 0.15, "w8a8-static": 0.15}
"""Largest difference of a token's log-prob; else 0.1. vLLM scales a token's inputs by max|x| / 127 in float32 where
compressed-tensors does by max|x| / 127.5 in bf16, and bf16 sums in another order differ by some hundredths."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Scheme -> (directory, prompts, what vLLM answered)."""
    folder = tmp_path_factory.mktemp("served")
    source = write_tiny_model(folder / "source", hidden=128, initializer_range=0.1, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (1, 7, 24, 60) * 4]
    jobs = []
    for name, scheme in SCHEMES.items():
        write_quantized(model, source, folder / name, scheme)
        job = {"directory": str(folder / name), "dtype": "bfloat16", "prompts": prompts, "max_tokens": 12, "stop": []}
        jobs.append(job | {"output": str(folder / f"{name}.json")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [PYTHON, ROOT / "tests/end_to_end/vllm_answers.py", folder / "jobs.json"],
        check=True,
        timeout=800,
        env={**os.environ, **ENVIRONMENT},
    )
    return {name: (folder / name, prompts, json.loads((folder / f"{name}.json").read_text())) for name in SCHEMES}


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_vllm_answers_as_our_own_loading(answers, name):
    directory, prompts, found = answers[name]
    if "error" in found and any(one in found["error"] for one in NOT_BUILT):
        pytest.skip(f"vLLM on this CPU has no kernel for {name}: {found['error'][:200]}")
    assert "error" not in found, found
    model = load_model(ModelConfig(source=str(directory), dtype="bf16")).eval()
    same = total = 0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + answer["tokens"]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        ours = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (ours - torch.tensor(answer["logprobs"])).abs().max() < LOGPROB.get(name, 0.1)
        assert (logprobs.amax(-1) - ours).max() < 2 * LOGPROB.get(
            name, 0.1
        )  # another token only where two are as likely
        same += int((logprobs.argmax(-1) == ids[0, len(prompt) :]).sum())
        total += len(answer["tokens"])
    assert same / total > 0.9

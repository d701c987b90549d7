"""TRL's ways to answers as contenders of rollout_engines.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from calibtrain.engines import Draws

Arm = Callable[[int], tuple[int, int]]


def trainer_arm(model: Any, tokenizer: Any, draws: Draws) -> Arm:
    """GRPOTrainer's own generation of the answers of `draws`, by transformers, which is its default."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from datasets import Dataset

    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(draws.prompts) * draws.samples,
        num_generations=draws.samples,
        max_completion_length=draws.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_kwargs={"eos_token_id": sorted(draws.stop_ids)},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    ids = [list(one) for one in draws.prompts for _ in range(draws.samples)]
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(one)} for one in ids]), processing_class=tokenizer,
    )  # fmt: skip

    def draw(number: int) -> tuple[int, int]:
        torch.manual_seed(number)
        completions, _ = trainer._generate_single_turn(ids, None, {}, draws.samples)
        return len(completions), sum(map(len, completions))

    return draw


def client_arm(base_url: str, name: str, draws: Draws) -> Arm:
    """`generate` of the client by which GRPOTrainer asks a vLLM server, here the one that our run has launched.

    Its constructor wants vLLM itself, for handing weights over by NCCL, which a CPU has not; what it asks with needs none.
    """
    import requests
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient.__new__(VLLMClient)
    client.session, client.base_url, client.model = requests.Session(), base_url, name
    client.session.trust_env = False  # no proxy

    def draw(number: int) -> tuple[int, int]:
        found = client.generate(
            [list(one) for one in draws.prompts],
            n=draws.samples,
            max_tokens=draws.max_new_tokens,
            generation_kwargs={"seed": max(0, number), "stop_token_ids": sorted(draws.stop_ids)},
        )
        return len(found["completion_ids"]), sum(map(len, found["completion_ids"]))

    return draw

"""TRL's ways to answers as contenders of rollout_engines.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

Arm = Callable[[int], tuple[int, int]]


def trainer_arm(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], group: int, tokens: int) -> Arm:
    """GRPOTrainer's own generation, by transformers, which is its default."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from datasets import Dataset

    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(prompts) * group, num_generations=group,
        max_completion_length=tokens, temperature=1.0, top_p=1.0, top_k=0, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False,
    )  # fmt: skip
    ids = [list(one) for one in prompts for _ in range(group)]
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(one)} for one in ids]), processing_class=tokenizer,
    )  # fmt: skip

    def draw(number: int) -> tuple[int, int]:
        torch.manual_seed(number)
        completions, _ = trainer._generate_single_turn(ids, None, {}, group)
        return len(completions), sum(map(len, completions))

    return draw


def client_arm(base_url: str, name: str, prompts: Sequence[Sequence[int]], group: int, tokens: int) -> Arm:
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
            [list(one) for one in prompts], n=group, max_tokens=tokens, generation_kwargs={"seed": number}
        )
        return len(found["completion_ids"]), sum(map(len, found["completion_ids"]))

    return draw

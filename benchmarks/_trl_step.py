"""TRL's ORPOTrainer as a contender of train_step.py."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _step_pairs import BETA, LEARNING_RATE, PAIRS, token_ids


def trl_worker(
    pipe: Connection,
    model: Path,
    shape: str,
    dtype: str = "float32",
    micro_batches: int = 1,
    compiled: bool = False,
    precision: str = "bf16",
) -> None:
    """ORPOTrainer.train(); a callback at the end of each step reports it and waits for the next."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if compiled:  # layer by layer, as accelerate advises for repeated layers, and as ours does
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Pace(TrainerCallback):
        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pipe.send("ready")
            self.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pipe.send({"seconds": time.perf_counter() - self.started, "loss": _loss_since(trainer)})
            self.wait()

        def wait(self) -> None:
            pipe.recv()
            self.started = time.perf_counter()

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    arguments = ORPOConfig(
        output_dir=tempfile.mkdtemp(dir=model.parent), beta=BETA, learning_rate=LEARNING_RATE, max_length=512,
        per_device_train_batch_size=PAIRS // micro_batches, gradient_accumulation_steps=micro_batches,
        max_steps=1_000_000, lr_scheduler_type="constant",
        bf16=precision == "bf16", use_cpu=True, gradient_checkpointing=False,
        optim="adamw_torch_fused", weight_decay=0.0, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=5, torch_compile=compiled,
    )  # fmt: skip
    one = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = ORPOTrainer(
        model=policy, args=arguments, train_dataset=one, processing_class=tokenizer, callbacks=[Pace()]
    )
    # Token ids in place of its tokenizer's, so that both sides see the same.
    trainer.train_dataset = Dataset.from_list(
        [_trl_row(*ids) for ids in token_ids(shape, policy.config.vocab_size, PAIRS)]
    )
    _keep_losses(trainer)
    trainer.train()


def _trl_row(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": "", "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        row[f"{name}_input_ids"] = [*prompt, *answer]
        row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
        row[f"{name}_labels"] = [-100] * len(prompt) + answer
    return row


def _keep_losses(trainer: Any) -> None:
    plain, trainer.seen = trainer.compute_loss, []

    def compute_loss(*args: Any, **options: Any) -> Any:
        loss = plain(*args, **options)
        trainer.seen.append(float(loss.detach()))
        return loss

    trainer.compute_loss = compute_loss


def _loss_since(trainer: Any) -> float:
    seen, trainer.seen = trainer.seen, []
    return statistics.mean(seen)

"""deepspeed_before.py with a calibration loss: three lines differ.

deepspeed --num_gpus 2 examples/deepspeed_after.py [MODEL]
"""

from __future__ import annotations

import deepspeed
from facts import chosen_model, load, rows
from transformers import DataCollatorForSeq2Seq

from calibtrain.losses import FocalLoss, causal_lm_loss

SETTINGS = {
    "train_micro_batch_size_per_gpu": 6,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def main(name: str, steps: int = 10, settings: dict = SETTINGS) -> list[float]:
    """Losses of the steps."""
    model, tokenizer = load(name)
    inputs = dict(DataCollatorForSeq2Seq(tokenizer)(rows(tokenizer)))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    objective = FocalLoss()
    losses = []
    for _ in range(steps):
        loss = causal_lm_loss(engine, objective, **inputs)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main(chosen_model()))

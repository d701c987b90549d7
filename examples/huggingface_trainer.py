"""The Hugging Face Trainer: a `compute_loss` of ten lines, calibration in its own logs.

python examples/huggingface_trainer.py [MODEL]
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from facts import QUESTIONS, chosen_model, load, rows
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from calibtrain.hooks.callback_huggingface import CalibrationCallback
from calibtrain.losses import FocalLoss, batch_from_labels, global_counts, loss_terms_from_model, normalized_loss


class FocalTrainer(Trainer):
    """Every term is divided by its count over all ranks and accumulated micro-batches, as the Trainer does for its own."""

    loss_is_scaled_for_ga = True  # normalized_loss does

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss = FocalLoss()
        self.calibration = CalibrationCallback(QUESTIONS).attach(self)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        counts = global_counts(self.loss, [batch_from_labels(**inputs).to(device) for inputs in batch_samples])
        return {name: count / self.accelerator.num_processes for name, count in counts.items()}  # DDP averages

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Fused: the logits are never made."""
        batch = batch_from_labels(**inputs)
        terms, stats = loss_terms_from_model(model, self.loss, batch)
        if model.training:
            self.calibration.update(stats, batch)
        loss = normalized_loss(terms, num_items_in_batch or self.loss.counts(batch))
        return (loss, {"logprob": stats.logprob}) if return_outputs else loss


def main(name: str, steps: int = 10, **arguments: Any) -> list[dict[str, float]]:
    """The Trainer's own log: loss and calibration in one row."""
    model, tokenizer = load(name)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "max_steps": steps,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "report_to": "none",
        }
        settings |= {"learning_rate": 1e-4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        trainer = FocalTrainer(
            model,
            TrainingArguments(folder, prediction_loss_only=True, **{**settings, **arguments}),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows(tokenizer),
            eval_dataset=rows(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer.state.log_history


if __name__ == "__main__":
    for row in main(chosen_model()):
        print(row)

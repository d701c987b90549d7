"""ORPO through TRL's DPOTrainer: its preference data and collator, no reference model, no logits.

python examples/trl_preference.py [MODEL]
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from facts import FACTS, PROMPT, chosen_model, load
from trl import DPOConfig, DPOTrainer

from calibtrain.hooks.callback_huggingface import CalibrationCallback
from calibtrain.losses import ORPOLoss, batch_from_labels, loss_terms_from_model, mean_loss


class ORPOTrainer(DPOTrainer):
    """DPOTrainer with ORPO's loss, which needs no reference."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ref_model = None
        self.loss = ORPOLoss(beta=0.5)
        self.calibration = CalibrationCallback().attach(self)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The collator's rows are the chosen answers, then the rejected ones."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        batch = batch_from_labels(inputs["input_ids"], labels, inputs["attention_mask"], pairs=True)
        terms, stats = loss_terms_from_model(model, self.loss, batch)
        if model.training:
            self.calibration.update(stats, batch)
        loss = mean_loss(terms)
        return (loss, {"logprob": stats.logprob}) if return_outputs else loss


def main(name: str, steps: int = 10, **arguments: Any) -> list[dict[str, float]]:
    """TRL's log."""
    model, tokenizer = load(name)
    data = Dataset.from_list(
        [
            {"prompt": PROMPT.format(city), "chosen": f" {right}", "rejected": f" {wrong}"}
            for city, right, wrong in FACTS
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "logging_steps": 2, "report_to": "none", "learning_rate": 1e-4, "bf16": False}
        trainer = ORPOTrainer(
            model, args=DPOConfig(folder, **{**settings, **arguments}), train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        return trainer.state.log_history


if __name__ == "__main__":
    for row in main(chosen_model()):
        print(row)

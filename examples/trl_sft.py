"""TRL's SFTTrainer with a calibration loss; its data preparation, packing and logging stay.

python examples/trl_sft.py [MODEL]
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from facts import FACTS, PROMPT, chosen_model, load
from trl import SFTConfig, SFTTrainer

from calibtrain.hooks.callback_huggingface import CalibrationCallback
from calibtrain.losses import FocalLoss, batch_from_labels, loss_terms_from_model, mean_loss


class CalibratedSFTTrainer(SFTTrainer):
    """SFTTrainer with a focal loss."""

    loss_is_scaled_for_ga = False  # a mean over the micro-batch: the Trainer divides by their number

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss = FocalLoss()
        self.calibration = CalibrationCallback().attach(self)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`labels` cover what TRL was told to learn: completions here, assistants' turns of a chat, or everything."""
        batch = batch_from_labels(
            inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), inputs.get("position_ids")
        )
        terms, stats = loss_terms_from_model(model, self.loss, batch)
        if model.training:
            self.calibration.update(stats, batch)
        loss = mean_loss(terms)
        return (loss, {"logprob": stats.logprob}) if return_outputs else loss


def main(name: str, steps: int = 10, **arguments: Any) -> list[dict[str, float]]:
    """TRL's log."""
    model, tokenizer = load(name)
    data = Dataset.from_list([{"prompt": PROMPT.format(city), "completion": f" {right}"} for city, right, _ in FACTS])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "logging_steps": 2, "report_to": "none", "learning_rate": 1e-4, "bf16": False}
        trainer = CalibratedSFTTrainer(
            model, SFTConfig(folder, **{**settings, **arguments}), train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        return trainer.state.log_history


if __name__ == "__main__":
    for row in main(chosen_model()):
        print(row)

"""Lightning: the loss in `training_step`, calibration in every logger and at each validation.

python examples/lightning_module.py [MODEL]
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from facts import QUESTIONS, chosen_model, load, rows
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from calibtrain.hooks.callback_lightning import CalibrationCallback
from calibtrain.losses import FocalLoss, batch_from_labels, causal_lm_loss, loss_terms_from_model, mean_loss


class Module(lightning.LightningModule):
    """A causal language model under a focal loss."""

    def __init__(self, model: Any, calibration: CalibrationCallback) -> None:
        super().__init__()
        self.model, self.calibration, self.loss = model, calibration, FocalLoss()

    def training_step(self, inputs: Any, index: int) -> torch.Tensor:
        """Fused: the logits are never made."""
        batch = batch_from_labels(**inputs)
        terms, stats = loss_terms_from_model(self.model, self.loss, batch)
        self.calibration.update(stats, batch)
        loss = mean_loss(terms)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, inputs: Any, index: int) -> None:
        """The callback asks its questions after the last of these."""
        self.log("validation_loss", causal_lm_loss(self.model, self.loss, **inputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(name: str, steps: int = 10, **arguments: Any) -> dict[str, float]:
    """What the callbacks of the finished run could monitor."""
    model, tokenizer = load(name)
    calibration = CalibrationCallback(QUESTIONS, tokenizer=tokenizer)
    loader = DataLoader(rows(tokenizer), batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    settings = {"max_steps": steps, "log_every_n_steps": 2, "check_val_every_n_epoch": 2, "logger": False}
    settings |= {"enable_checkpointing": False, "accelerator": "auto"}
    trainer = lightning.Trainer(callbacks=[calibration], **{**settings, **arguments})
    trainer.fit(Module(model, calibration), loader, loader)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    for key, value in main(chosen_model()).items():
        print(f"{key} {value:.4f}")

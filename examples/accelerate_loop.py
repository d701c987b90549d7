"""Accelerate: gradients are accumulated and averaged over processes, the loss is that of the whole step.

accelerate launch examples/accelerate_loop.py [MODEL]
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from facts import chosen_model, load, rows
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from calibtrain.losses import FocalLoss, batch_from_labels, global_counts, loss_terms_from_model, normalized_loss


def main(name: str, steps: int = 10) -> list[float]:
    """Losses of the steps."""
    accelerator = Accelerator()  # accumulation is below, by items instead of micro-batches
    model, tokenizer = load(name)
    loss = FocalLoss()
    loader = DataLoader(rows(tokenizer), batch_size=2, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(steps):
        window = [batch_from_labels(**inputs) for inputs in loader]
        counts = global_counts(loss, window)
        shares = []
        for number, batch in enumerate(window):
            with accelerator.no_sync(model) if number + 1 < len(window) else nullcontext():
                terms, _ = loss_terms_from_model(model, loss, batch)
                share = normalized_loss(terms, counts)
                accelerator.backward(share * accelerator.num_processes)  # gradients are averaged over processes
                shares.append(share.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(torch.stack(shares).sum()).item())
    return losses


if __name__ == "__main__":
    print(main(chosen_model()))

"""A plain PyTorch loop with accumulation, whose gradient does not depend on how a step is cut into micro-batches.

python examples/plain_pytorch.py [MODEL]
"""

from __future__ import annotations

import torch
from facts import chosen_model, load, rows
from transformers import DataCollatorForSeq2Seq

from calibtrain.losses import FocalLoss, batch_from_labels, global_counts, loss_terms_from_model, normalized_loss


def main(name: str, steps: int = 10) -> list[float]:
    """Losses of the steps."""
    model, tokenizer = load(name)
    collate = DataCollatorForSeq2Seq(tokenizer)
    loss = FocalLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data, losses = rows(tokenizer), []
    for _ in range(steps):
        window = [batch_from_labels(**collate(data[:4])), batch_from_labels(**collate(data[4:]))]
        counts = global_counts(loss, window)  # over the micro-batches, and over ranks if there are any
        total = 0.0
        for batch in window:
            terms, _ = loss_terms_from_model(model, loss, batch)
            share = normalized_loss(terms, counts)
            share.backward()
            total += share.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    print(main(chosen_model()))

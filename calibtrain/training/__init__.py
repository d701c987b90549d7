"""The training loop on a DeepSpeed engine."""

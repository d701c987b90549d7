"""Entry points that start training."""

"""What listens to the training loop."""

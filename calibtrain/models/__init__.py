"""The model DeepSpeed wraps."""

"""calibtrain: fine-tune language models so that they know when they are guessing."""

__version__ = "0.1.0"

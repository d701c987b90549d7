"""Thresholds with guarantees, and words for probabilities."""

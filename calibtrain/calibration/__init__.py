"""Metrics, their mergeable state and post-hoc calibrators."""

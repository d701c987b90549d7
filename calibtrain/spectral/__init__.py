"""Singular values, polar factors and rotations of weight matrices: what training changed, and what of it is chance."""

from calibtrain.spectral.compare import Settings, compare

__all__ = ["Settings", "compare"]

"""Singular values, polar factors and rotations of weight matrices."""

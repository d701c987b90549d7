"""Whole jobs, one file each."""

"""Losses of calibtrain, importable with torch alone."""

"""Where a confidence comes from."""

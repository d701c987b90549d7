"""Run configurations shipped with calibtrain."""

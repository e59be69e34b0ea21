"""Metrics of generated text: pure functions, one file for each metric."""

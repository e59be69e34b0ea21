"""Scores of generated text: pure functions, one metric a file."""

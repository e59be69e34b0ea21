"""Scores of answers: the metrics of a set of examples, and the held-out rows of a run."""

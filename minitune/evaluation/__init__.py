"""Scores answers: the metrics of a set of examples, and the evaluation of a run on its held-out rows."""

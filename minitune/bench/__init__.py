"""Measurements of whole commands, of the kernels and of the metrics, in turn with their peers."""

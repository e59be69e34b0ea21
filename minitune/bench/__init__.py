"""Benchmarks of whole commands, kernels and metrics, measured in turn with other systems (peers)."""

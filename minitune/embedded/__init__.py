"""The embedded models and rows, and the code that makes them from a seed."""

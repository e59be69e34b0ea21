"""The embedded models and rows, and how they are made from a seed."""

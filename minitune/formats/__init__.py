"""Formats of rows, chat templates, and files of rows."""

"""What a script does: one dataclass of options and one function a module."""

"""The jobs of the scripts. Each module has one dataclass of options and one function."""

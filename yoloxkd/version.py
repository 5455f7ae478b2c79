"""The package's version, on the lowest floor so that every room may name it."""

__version__ = "0.1.0"

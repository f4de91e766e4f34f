"""The version, for all who ask without importing torch."""

__version__ = "0.1.0"

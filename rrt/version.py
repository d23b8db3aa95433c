"""The package's version; pyproject.toml and `rrt.info` read it here."""

__version__ = "0.1.0"

"""The one place the version is written: pyproject.toml and `rrt.info` read it."""

__version__ = "0.1.0"

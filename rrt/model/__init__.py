"""The model: configuration, layers, sizes; no files."""

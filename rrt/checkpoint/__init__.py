"""Checkpoints on disk: our format, Hugging Face layouts, presets."""

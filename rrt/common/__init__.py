"""Code that knows no model: files, commands, processes, results."""

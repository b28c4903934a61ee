"""A run: configuration to folder, with checkpoints and resume."""

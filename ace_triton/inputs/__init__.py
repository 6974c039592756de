"""Reads checkpoints and text, and writes checkpoints."""

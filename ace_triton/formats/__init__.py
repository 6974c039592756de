"""Formats of a saved model: one file each, and the registry through which models are saved and loaded."""

"""Finds a model's blocks and runs calibration data through them, one block at a time."""

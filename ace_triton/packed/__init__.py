"""Layers and checkpoints that hold n:m weights packed, and run from there."""

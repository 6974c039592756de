"""Layers and checkpoints that store n:m weights packed, and products with packed weights."""

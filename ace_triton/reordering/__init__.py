"""Finds orders and rotations of channels in which a pattern loses less, and folds them into the weights."""

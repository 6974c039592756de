"""Structured pruning: whole channels, key-value groups or blocks are removed, which leaves a smaller dense model."""

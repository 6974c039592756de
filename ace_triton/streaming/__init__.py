"""Prune and evaluate models larger than memory: weights stay in files, and only the block in work is in memory."""

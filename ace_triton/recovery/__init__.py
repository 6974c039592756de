"""Trains the kept weights of a pruned model toward the dense model's predictions."""

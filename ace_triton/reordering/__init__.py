"""Finds channel orders in which n:m loses less, and folds them into the weights."""

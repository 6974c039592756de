"""Solvers that update the kept weights after the mask is chosen."""

"""Whether a run fits in memory, or must keep its weights in files."""

from __future__ import annotations

from ..available_memory import available_memory

LARGEST_SHARE = 0.7
"""Largest share of the available memory that a run in memory may need."""

SURELY_ENOUGH = 8
"""A run in memory never needs this many times the size of the model's files."""


def fits_in_memory(bytes_needed: float) -> bool:
    """True if a run that needs this many bytes fits in the memory that is available to this process."""
    return bytes_needed <= LARGEST_SHARE * available_memory()


def surely_fits(file_bytes: int) -> bool:
    """True if a run in memory fits in any case, from the size of the model's files alone."""
    return fits_in_memory(SURELY_ENOUGH * file_bytes)

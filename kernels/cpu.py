"""The compiled CPU bodies of the operations, loaded with ctypes."""

from __future__ import annotations


def available() -> bool:
    """True where the compiled library was built and loads."""
    return False


def why_unavailable() -> str:
    """One phrase: why :func:`available` is False."""
    return "not built"

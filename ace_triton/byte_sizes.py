"""Numbers of bytes as text."""

from __future__ import annotations


def shown_bytes(size: float) -> str:
    """A number of bytes in KB, MB or GB, which are powers of 1000, as ``--size`` and ``--max-shard-size`` take them."""
    if round(size / 1e6, 1) >= 1000:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:.1f} MB" if round(size / 1e3, 1) >= 1000 else f"{size / 1e3:.1f} KB"

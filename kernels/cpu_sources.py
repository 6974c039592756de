"""What the compiled CPU library was built from. setup.py runs this file too: it imports nothing of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "cpu"
"""Of the sources; an installed package has none."""


def digest(folder: Path = FOLDER) -> str:
    """SHA-256 of names and contents, in hexadecimal; "" where there are no sources."""
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest() if files else ""

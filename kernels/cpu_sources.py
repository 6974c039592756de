"""Compiler options and digest of the CPU library's sources. setup.py runs this file too, so it imports nothing from the
package."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "cpu"
"""Folder of the C++ sources; an installed package has only abi.h in it."""

COMPILE_ARGUMENTS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-g0",
]
"""GCC and Clang know all of these options."""


def digest(folder: Path = FOLDER) -> str:
    """SHA-256 of the sources' names and contents, in hexadecimal; "" if there are no C++ sources."""
    sources = list(folder.glob("*.cpp"))
    if not sources:
        return ""
    files = sorted([*sources, *folder.glob("*.h")])
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()

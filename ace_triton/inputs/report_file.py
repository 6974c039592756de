"""The files that ace-triton writes beside a model, by which it knows its own folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORT_FILE = "ace_triton.json"
MANIFEST_FILE = "ace_triton_packed.json"

NAMED = 4
"""An error names this many files and counts the others."""


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file cannot be read or has another JSON value."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def listing(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

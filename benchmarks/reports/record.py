"""Reads the record of a report: the JSON file beside its page, to which each run adds what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_record(path: Path, **empty: Any) -> dict[str, Any]:
    """The record in a file.

    Args:
        path: the JSON file.
        empty: the entries of a record without results, for a file that does not exist.
    """
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    return record

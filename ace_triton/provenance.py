"""What a result was made from and with: the same facts in every file that this package writes."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "triton")


def with_provenance(content: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content with further facts, the versions of the libraries and the date; for JSON."""
    return {**content, **facts, "versions": versions(), "date": now()}


def option_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options for JSON; a value that JSON does not have as Python writes it."""
    return {name: value if _is_json(value) else repr(value) for name, value in options.items()}


def versions() -> dict[str, str | None]:
    """Versions by name; None for a library that is not installed."""
    from . import __version__

    return {
        "ace_triton": __version__,
        **{name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def name_of(source: str | Path) -> str:
    """A model's or text's name, without the folders of this machine."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def source_facts(source: str | Path, out: str | Path) -> dict[str, Any]:
    """What a report in the folder ``out`` says of the model that it was made from.

    Returns:
        ``source``, its name. For a model on this machine also ``source_path``: its path from ``out``, if it lies in the
        folder that ``out`` lies in, and None elsewhere, so that no path of the machine is written.
    """
    path = Path(source)
    if not path.exists():
        return {"source": str(source)}
    place, beside = path.resolve(), Path(out).resolve().parent
    inside = place.is_relative_to(beside) and beside != Path(beside.anchor)
    return {
        "source": name_of(source),
        "source_path": Path(os.pardir, place.relative_to(beside)).as_posix() if inside else None,
    }


def source_of(report: dict[str, Any], folder: str | Path) -> str | None:
    """The model that a folder's report was made from, as a name that loads; None if it does not say where that is."""
    source = report.get("source")
    if not isinstance(source, str):
        return None
    if "source_path" not in report:
        return source
    path = report["source_path"]
    return None if not isinstance(path, str) else str(Path(os.path.normpath(Path(folder).resolve() / path)))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Where a result comes from: the source, library versions and date that this package writes into each file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .inputs.model_card import license_of

LIBRARIES = ("torch", "transformers", "triton")


def with_provenance(content: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content with further facts, the versions of the libraries and the date, as JSON types."""
    return {**content, **facts, "versions": versions(), "date": now()}


def history_with(earlier: Mapping[str, Any] | None, command: str, did: str, **facts: Any) -> list[dict[str, Any]]:
    """The steps that led from a dense model to a result, the first one first.

    Args:
        earlier: the report of the model that the step read; None if it has none.
        command: the command of the step.
        did: what it did, in a few words.
        facts: what the step cost and brought, such as ``seconds``, or ``bytes`` before and after; None is left out.
    """
    step = {"command": command, "did": did, **{name: fact for name, fact in facts.items() if fact is not None}}
    return [*history_of(earlier), step]


def history_of(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The valid steps in a report, the first one first."""
    steps = (report or {}).get("history")
    return [
        step
        for step in (steps if isinstance(steps, list) else [])
        if isinstance(step, dict) and all(isinstance(step.get(name), str) for name in ("command", "did"))
    ]


def option_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options as JSON types; any other value becomes its ``repr``."""
    return {name: value if _is_json(value) else repr(value) for name, value in options.items()}


def versions() -> dict[str, str | None]:
    """Versions by library name; None if a library is not installed."""
    from . import __version__

    return {
        "ace_triton": __version__,
        **{name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def name_of(source: str | Path) -> str:
    """A model's or text's name, without the folders of this machine."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def source_facts(source: str | Path, out: str | Path) -> dict[str, Any]:
    """The facts about the source model that a report in the folder ``out`` records.

    Returns:
        ``source``, the model's name. For a model on this machine also ``source_path``: its path relative to ``out`` if
        the model is below ``out``'s parent folder, else None, so that no other path of the machine is written. And
        ``source_license``, if the model card beside it names a license.
    """
    path = Path(source)
    if not path.exists():
        return {"source": str(source)}
    place, parent = path.resolve(), Path(out).resolve().parent
    inside = place.is_relative_to(parent) and parent != Path(parent.anchor)
    license = license_of(place if place.is_dir() else place.parent)
    return {
        "source": name_of(source),
        "source_path": Path(os.pardir, place.relative_to(parent)).as_posix() if inside else None,
        **({} if license is None else {"source_license": license}),
    }


def source_of(report: dict[str, Any], folder: str | Path) -> str | None:
    """The source model in a folder's report, as a name that loads; None if the report does not say where it is."""
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

"""The journal of a run that writes a model block by block, from which the run resumes after an interruption.

A JSON object a line: first what the run does, then its results as they come. A last line that is incomplete, because
the run was killed while it wrote it, does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FORMAT = "ace_triton.journal.1"


class Results:
    """Results of a run by name.

    Attributes:
        results: the results so far, in order.
    """

    def __init__(self, results: Mapping[str, Any] | None = None) -> None:
        self.results: dict[str, Any] = dict(results or {})

    def add(self, name: str, result: Any) -> None:
        """Add a result."""
        self.results[name] = result


class Journal(Results):
    """Results of a run by name, in a file.

    Args:
        path: the file; it is created if it does not exist.
        facts: what the run does, as JSON types. A journal with other facts is refused.

    Raises:
        CheckpointError: if the journal belongs to a run with other facts (the first difference is named), or cannot be
            read.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._path = path
        try:
            lines = _complete_lines(path)
            if not lines:
                self._write({"format": FORMAT, "facts": dict(facts)}, fresh=True)
                return
            first, *rest = map(json.loads, lines)
            known, kept = first["format"] == FORMAT, dict(first["facts"])
            self.results = {entry["name"]: entry["result"] for entry in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: the state of the interrupted run is damaged: add --restart") from error
        if None in self.results.values():
            raise CheckpointError(f"{path}: the state of the interrupted run is damaged: add --restart")
        if not known:
            raise CheckpointError(f"{path}: the interrupted run was of another version of ace-triton: add --restart")
        difference = _difference(kept, json.loads(json.dumps(dict(facts))))
        if difference is not None:
            raise CheckpointError(
                f"the interrupted run had {difference}: repeat its command to resume it, or add --restart to throw "
                "its state away"
            )
        self._write_all(lines)

    def add(self, name: str, result: Any) -> None:
        """Add a result, as JSON types. It is on disk when this returns."""
        super().add(name, result)
        self._write({"name": name, "result": result})

    def _write(self, entry: Mapping[str, Any], *, fresh: bool = False) -> None:
        with self._path.open("w" if fresh else "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_all(self, lines: list[str]) -> None:
        """Write the complete lines again, so that new ones do not follow an incomplete one."""
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.replace(self._path)


def _complete_lines(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return text.split("\n")[:-1]


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first difference of two JSON objects, as "another NAME (OLD, not NEW)"; None if they are equal."""
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _difference(before, after, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif before != after:
            return f"another {prefix}{name} ({before!r}, now {after!r})"
    return None

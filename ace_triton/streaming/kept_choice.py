"""Keeps the ranking and the choice of a streamed shrink in files, so that an interrupted run resumes after each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..structures.choice import Choice
from ..structures.choice_record import choice_of, record_of
from ..structures.compensation import Moments
from ..structures.ranking import Ranked
from ..structures.run import Run

MOMENTS, RANKED = "moments.safetensors", "ranking.safetensors"
RANKING, CHOICE = "ranking", "choice"
"""The steps after which an interrupted run leaves its state."""

_IMPORTANCE = "importance."

Once = Callable[[str, Callable[[], Any]], Any]
"""Gives a result, as JSON types, by name; computes it only if no earlier run did."""


class KeptChoice:
    """The ranking and the choice of a run.

    Args:
        once: keeps results in the journal.
        folder: holds the tensors.
    """

    def __init__(self, once: Once, folder: Path) -> None:
        self._once, self._folder = once, folder

    def choice(self, run: Run) -> Choice:
        """What is kept: chosen by this run, or by the interrupted one."""
        path, found = self._folder / MOMENTS, []

        def choose() -> dict[str, Any]:
            choice = run.choice(lambda rank: self._ranking(run, rank))
            found.append(choice)
            digest = _save(_named(choice.moments), path)
            return {**record_of(choice), "seconds": dict(run.seconds), "sha256": digest}

        record = self._once(CHOICE, choose)
        if found:
            return found[0]
        run.seconds.update(record["seconds"])
        return choice_of(record, run.tower.blocks, _moments(_read(path, record)))

    def _ranking(self, run: Run, rank: Callable[[], Ranked]) -> Ranked:
        """The ranking of this run, or of the interrupted one."""
        path, found = self._folder / RANKED, []

        def ranking() -> dict[str, Any]:
            importance, moments = rank()
            found.append((importance, moments))
            digest = _save({f"{_IMPORTANCE}{name}": of for name, of in importance.items()} | _named(moments), path)
            return {"seconds": dict(run.seconds), "sha256": digest}

        record = self._once(RANKING, ranking)
        if found:
            return found[0]
        tensors = _read(path, record)
        run.seconds.update(record["seconds"])
        importance = {n.removeprefix(_IMPORTANCE): t for n, t in tensors.items() if n.startswith(_IMPORTANCE)}
        return importance, _moments(tensors)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Save tensors to a file that appears whole or not at all; returns its SHA-256."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    digest = _digest(partial)
    partial.replace(path)
    return digest


def _read(path: Path, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a file; CheckpointError if it is not the one whose SHA-256 is in the record."""
    damaged = CheckpointError(f"{path}: the state of the interrupted run is damaged: add --restart")
    try:
        if _digest(path) != record.get("sha256"):
            raise damaged
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": getattr(of, part) for name, of in moments.items() for part in ("mean", "square")}


def _moments(tensors: Mapping[str, torch.Tensor]) -> dict[str, Moments]:
    names = [name.removeprefix("mean.") for name in tensors if name.startswith("mean.")]
    return {name: Moments(tensors[f"mean.{name}"], tensors[f"square.{name}"]) for name in names}

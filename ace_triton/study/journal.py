"""The results of a study on disk: one JSON record per line, the setting first; later records replace earlier ones."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import RecipeError, StudyError
from .cells import Cell
from .records import CellResult, DenseResult, ModelNorms, Record, Run, Sample, Setting

FILE = "results.jsonl"
FORMAT = "ace_triton.study.1"

MAY_DIFFER = ("model", "calibration", "evaluation", "further_window_lengths")
"""Fields of a setting that may change on resume: names (digests are compared instead) and further windows."""

_KINDS: dict[str, type[Any]] = {
    "setting": Setting,
    "dense": DenseResult,
    "cell": CellResult,
    "norms": ModelNorms,
    "sample": Sample,
    "run": Run,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass
class Results:
    """What a journal holds.

    Attributes:
        setting: what all cells have in common.
        dense: the unpruned model; None until it is measured.
        cells: results by cell, in the order of measurement.
        samples: texts and divergences by cell; the dense model's under None.
        norms: the input norms; None until they are collected.
        runs: the calls that measured something; empty in studies older than this record.
    """

    setting: Setting
    dense: DenseResult | None = None
    cells: dict[Cell, CellResult] = field(default_factory=dict)
    samples: dict[Cell | None, Sample] = field(default_factory=dict)
    norms: ModelNorms | None = None
    runs: list[Run] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Add one record."""
        if isinstance(record, Setting):
            self.setting = record
        elif isinstance(record, DenseResult):
            self.dense = record
        elif isinstance(record, CellResult):
            self.cells[record.cell] = record
        elif isinstance(record, Sample):
            self.samples[record.cell] = record
        elif isinstance(record, ModelNorms):
            self.norms = record
        elif isinstance(record, Run):
            self.runs.append(record)


class Journal:
    """A study's results, open for writing by one process.

    Records are atomic: a line that a kill left incomplete is removed when the study is opened again.

    Args:
        folder: created if it does not exist.
        setting: the study to start or resume; further window lengths are added to those in the file.

    Attributes:
        folder: where the file is.
        results: its contents.

    Raises:
        StudyError: if the folder holds a study with another setting or an invalid file, or another process writes it.
    """

    def __init__(self, folder: str | Path, setting: Setting) -> None:
        self.folder = Path(folder)
        path = self.folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StudyError(
                    f"{folder}: another process is running this study: wait until it ends, or stop it"
                ) from None
            if path.stat().st_size:
                self.results = read_results(path)
                _check_same(folder, self.results.setting, setting)
                os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)
                extended = self.results.setting.with_windows(setting.further_window_lengths)
                if extended != self.results.setting:
                    self.append(extended)
            else:
                self.results = Results(setting)
                self._write(setting, format=FORMAT)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: Record) -> None:
        """Write a record; it is on disk when this returns."""
        self._write(record)
        self.results.add(record)

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, record: Record, **more: str) -> None:
        line = json.dumps({"kind": _NAMES[type(record)], **more, **record.to_dict()}, ensure_ascii=False) + "\n"
        data = line.encode()
        if os.write(self._file, data) != len(data):
            raise OSError(f"a result could not be written completely ({len(data)} bytes): is the disk full?")
        os.fsync(self._file)


def read_results(path: str | Path) -> Results:
    """The results in a journal's file, or in a study's folder.

    Raises:
        StudyError: if there is no such file, or it does not hold a study.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
        records = [json.loads(line) for line in lines]
        if not records or records[0].pop("format", None) != FORMAT:
            raise StudyError(f"{file}: not the results of a study of this version ({FORMAT}); name another folder")
        setting, *rest = [_KINDS[record.pop("kind")].from_dict(record) for record in records]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{file}: cannot be read as the results of a study ({error!r})") from error
    except RecipeError as error:
        raise StudyError(f"{file}: {error}") from error
    results = Results(setting)
    for record in rest:
        results.add(record)
    return results


def _check_same(folder: str | Path, stored: Setting, wanted: Setting) -> None:
    differing = [
        f"{f.name} was {getattr(stored, f.name)!r}, is {getattr(wanted, f.name)!r}"
        for f in fields(Setting)
        if f.name not in MAY_DIFFER and getattr(stored, f.name) != getattr(wanted, f.name)
    ]
    if differing:
        raise StudyError(
            f"{folder} holds a study with another setting: {'; '.join(differing)}. Name another folder, or use the "
            "setting that the study was started with"
        )

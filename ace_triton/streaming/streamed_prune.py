"""Prune a checkpoint into another checkpoint while only the block in work is in memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..inputs import checkpoint
from ..inputs.model_source import ModelSource, safetensors_files
from ..inputs.output_folder import Reservation, publish, reserved, write_report, writing
from ..provenance import versions
from .file_store import FileStore
from .journal import Journal
from .mapped_model import MappedModel

JOURNAL = "journal.jsonl"


@dataclass
class StreamedModel:
    """A model whose weights stay in files, from :func:`streamed`.

    Attributes:
        model: the model. Its weights have their values once :meth:`start` was called.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any
    _mapped: MappedModel
    _place: Reservation
    _source: str
    _out: Path
    _overwrite: bool
    _store: FileStore | None = None

    def start(self, facts: Mapping[str, Any]) -> FileStore:
        """Read the weights from the source into the files of the new checkpoint.

        Args:
            facts: everything that decides the result, as JSON types. An interrupted run is resumed only if its facts
                were the same.

        Raises:
            CheckpointError: if an interrupted run had other facts (the difference is named).
        """
        with writing(self._place, self._out):
            whole = {"source": source_state(self._source), **facts, "versions": versions()}
            journal = Journal(self._place.kept / JOURNAL, whole)
            self._store = FileStore(self._mapped, journal, self._keep)
            self._mapped.fill(except_for=self._store.finished_parameters)
        return self._store

    def publish(self, report: dict[str, Any]) -> None:
        """Complete the checkpoint and rename it to its final name.

        Args:
            report: as for :func:`~ace_triton.inputs.checkpoint.save`.
        """
        with writing(self._place, self._out):
            self._mapped.write_converted()
            with tempfile.TemporaryDirectory(dir=self._place.kept) as rest:
                self.model.save_pretrained(rest, state_dict={})
                self.tokenizer.save_pretrained(rest)
                for path in Path(rest).iterdir():
                    if not path.name.startswith("model") or not path.name.endswith((".safetensors", ".index.json")):
                        path.replace(self._place.new / path.name)
            write_report(self._place.new, report)
            publish(self._place, self._out, overwrite=self._overwrite)

    def _keep(self) -> None:
        self._place.resumable = True


@contextmanager
def streamed(
    source: str,
    out: Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    restart: bool = False,
) -> Iterator[StreamedModel]:
    """Open a model whose weights stay in the files of a new checkpoint.

    Args:
        source, dtype, trust_remote_code: as for :func:`~ace_triton.inputs.checkpoint.load`.
        out: folder for the new checkpoint; it is reserved until the context ends.
        overwrite: as for :func:`~ace_triton.inputs.output_folder.check_out`.
        restart: throw away the state of an interrupted run.

    Raises:
        CheckpointError: if the model cannot be loaded or streamed, or ``out`` cannot be written.
    """
    with reserved(out, overwrite=overwrite, resumable=True, restart=restart) as place:
        with writing(place, out):
            place.keep()
            model, tokenizer = checkpoint.load(
                source, dtype=dtype, trust_remote_code=trust_remote_code, offload_folder=place.kept / "converted"
            )
            mapped = MappedModel(model, place.new, place.kept / "own_form")
        yield StreamedModel(model, tokenizer, mapped, place, source, out, overwrite)


def source_state(source: str) -> dict[str, Any]:
    """Which files a model is loaded from: names, sizes and times of change; a hub name alone for a model of the hub."""
    found = ModelSource.find(source)
    if found.path is None:
        return {"name": found.name}
    paths = [found.path] if found.is_gguf else [found.path / "config.json", *safetensors_files(found.path)]
    states = {path.name: path.stat() for path in paths}
    return {"files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's values, on the CPU."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

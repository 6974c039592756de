"""The store of a model whose weights stay in files: what is finished is on disk, and survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoders.device_blocks import DeviceBlocks
from ..process_memory import drop_pages, give_back_free_memory
from ..processes import Processes
from .journal import Results
from .mapped_model import MappedModel

_UNIT = "unit "


class FileStore:
    """A :class:`~ace_triton.decoders.weight_store.WeightStore` of mapped weights with a journal.

    A finished unit is written to disk in the background, and enters the journal once it is there.

    Args:
        mapped: the model.
        journal: results of an earlier run on the same files, if it was interrupted; only the first process has a file.
        on_finish: called when a unit has entered the journal.
        processes: this process and the others that prune the same files.
        device: where blocks run and are pruned.
        offload_folder: folder for files with the hidden states; None to keep them in memory.
        errors: gives a context that explains errors of the disk.
    """

    keeps_changes_private = False

    def __init__(
        self,
        mapped: MappedModel,
        journal: Results,
        on_finish: Callable[[], None],
        processes: Processes,
        device: torch.device,
        offload_folder: Path | None = None,
        errors: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._errors = errors
        self.offload_folder = offload_folder
        self._device = device
        self._blocks = DeviceBlocks(mapped.model, dict.fromkeys(mapped.model.parameters(), device), mapped.drop)
        self._mapped, self._journal, self._on_finish, self._processes = mapped, journal, on_finish, processes
        self._writer = ThreadPoolExecutor(1, "ace-triton-writer")
        self._pending: Future[None] | None = None
        self.resumed = finished_units(journal)

    @property
    def units(self) -> list[str]:
        """Names of all units of the run; empty if it has not started to prune."""
        return list(self._journal.results.get("units", ()))

    @property
    def finished_parameters(self) -> list[str]:
        """Names of the parameters of all units that an earlier run finished."""
        return [name for unit in self.resumed for name in self._journal.results[_UNIT + unit]["parameters"]]

    def release(self, module: nn.Module) -> None:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        self._mapped.release(module)

    @contextmanager
    def in_use(self, modules: Sequence[nn.Module]) -> Iterator[bool]:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        with self._blocks.in_use(modules):
            yield True
        give_back_free_memory()  # The allocator keeps what one unit has freed, in pieces that do not fit the next.

    def finished(self, unit: str) -> dict[str, Any] | None:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`; units of this run do not count."""
        return self._journal.results[_UNIT + unit] if unit in self.resumed else None

    def finish(self, unit: str, modules: Sequence[nn.Module], record: dict[str, Any]) -> None:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`; errors of the disk may come one unit later."""
        names = self._mapped.names_of(modules)
        if self._processes.is_first:
            self._blocks.write_back(modules)
        self._processes.wait()
        if not self._processes.is_first:
            self.adopt(names)
            return
        self.wait()
        self._pending = self._writer.submit(self._write, unit, names, {**record, "parameters": names})

    def adopt(self, names: Sequence[str]) -> None:
        """Take parameters from the files, which the first process has written."""
        for name in names:
            old = self._blocks.map_to(self._mapped.model.get_parameter(name), self._mapped.in_files(name))
            drop_pages(old)

    def as_loaded(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        return self._mapped.as_in_source(modules)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """As in :class:`~ace_triton.decoders.weight_store.WeightStore`."""
        if name not in self._journal.results:
            result = self._processes.first_does(compute)
            self.wait()
            self._journal.add(name, result)
        return self._journal.results[name]

    def wait(self) -> None:
        """Wait until every finished unit is on disk.

        Raises:
            OSError: if a unit could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextmanager
    def open(self) -> Iterator[None]:
        """A context in which units are pruned; at its end the background thread has stopped."""
        try:
            with self._errors(), self._blocks.placed():
                for module in self._mapped.model.modules():
                    for name, buffer in module.named_buffers(recurse=False):
                        module._buffers[name] = buffer.to(self._device)
                yield
                self.wait()
        finally:
            self._writer.shutdown()

    def _write(self, unit: str, names: list[str], record: dict[str, Any]) -> None:
        self._mapped.sync(names)
        self._journal.add(_UNIT + unit, record)
        self._on_finish()


def finished_units(journal: Results) -> tuple[str, ...]:
    """The units that a journal has, in order."""
    return tuple(name.removeprefix(_UNIT) for name in journal.results if name.startswith(_UNIT))

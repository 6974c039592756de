"""Where weights and hidden states are kept while a model is pruned, and what was finished before an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import nn


class WeightStore(Protocol):
    """Keeps the weights of a model that is pruned one unit (a block, or the layers outside the blocks) at a time.

    Records and results are JSON types.
    """

    @property
    def keeps_changes_private(self) -> bool:
        """False if a change to a weight stays even if this process is killed."""

    @property
    def offload_folder(self) -> Path | None:
        """The folder for files with the hidden states; None to keep them in memory."""

    def release(self, module: nn.Module) -> None:
        """The module's weights are not needed soon. Their values stay, and the next access loads them again."""

    def in_use(self, modules: Sequence[nn.Module]) -> AbstractContextManager[bool]:
        """A context in which modules run and are pruned; it gives True if their weights lie elsewhere meanwhile."""

    def finished(self, unit: str) -> dict[str, Any] | None:
        """The record of a unit that an earlier run pruned; None if the unit is still to be pruned."""

    def finish(self, unit: str, modules: Sequence[nn.Module], record: dict[str, Any]) -> None:
        """A unit is pruned: save the weights of its modules, and its record."""

    def as_loaded(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """A context in which modules of a finished unit have their dense weights again, for forwards only."""

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result that an interrupted run does not compute again: from an earlier run, or from ``compute``."""


class InMemory:
    """Weights that stay in memory; nothing is saved.

    Args:
        offload_folder: folder for files with the hidden states; None to keep them in memory too.
    """

    keeps_changes_private = True

    def __init__(self, offload_folder: Path | None = None) -> None:
        self.offload_folder = offload_folder

    def release(self, module: nn.Module) -> None:
        """Nothing to do."""

    def in_use(self, modules: Sequence[nn.Module]) -> AbstractContextManager[bool]:
        """Nothing to do."""
        return nullcontext(False)

    def finished(self, unit: str) -> dict[str, Any] | None:
        """None: no earlier run is known."""
        return None

    def finish(self, unit: str, modules: Sequence[nn.Module], record: dict[str, Any]) -> None:
        """Nothing to do."""

    def as_loaded(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Nothing to do, because no unit is finished before."""
        return nullcontext()

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``."""
        return compute()

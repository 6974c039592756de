"""Where the weights of the dense model are while it is made smaller: in memory, or in files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from ..decoders.kept_tensors import KeptTensors


class Weights(Protocol):
    """Gives access to the weights of a model."""

    @property
    def in_files(self) -> bool:
        """True if weights are in memory only inside :meth:`loaded` and while their block runs."""

    @property
    def keep(self) -> Callable[[], KeptTensors]:
        """Makes what keeps the hidden states of the calibration set."""

    def loaded(self, part: nn.Module) -> AbstractContextManager[None]:
        """A context in which a part's weights are in memory. If they lie in files, changes are lost at its end.

        Args:
            part: a block, or the model for the weights outside its blocks.
        """


class InMemory:
    """The weights of a model that is in memory as a whole."""

    in_files = False
    keep: Callable[[], KeptTensors] = dict

    def loaded(self, part: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

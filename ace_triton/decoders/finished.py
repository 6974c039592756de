"""Caches outputs of a block's fully pruned modules, so that later runs of the block need not compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels.written import version_of
from .kept_tensors import KeptTensors
from .watcher import Watcher


class FinishedOutputs:
    """Cached outputs of the finished modules of one block, by module and batch.

    An output is cached only if the module ran before every layer still to be pruned, so later pruning cannot change it.
    It is dropped if the module ran twice in a batch, or if the block changed the output in place.
    If a module returns a tuple, only its first tensor is cached; the rest is replaced by None (attention weights, which
    blocks rarely read). The cached outputs of attention take as much memory as the calibration set's hidden states.

    Args:
        keep: makes what keeps the tensors.
    """

    def __init__(self, keep: Callable[[], KeptTensors] = dict) -> None:
        self._tensors = keep()
        self._sizes: dict[tuple[nn.Module, int], int | None] = {}
        """The size of the tuple that a module returned; None for a tensor."""

    def clear(self) -> None:
        """Remove all outputs from the cache."""
        self._tensors.clear()
        self._sizes.clear()

    def cached_for(self, modules: Sequence[nn.Module], number: int) -> list[nn.Module]:
        """Those of ``modules`` whose output for batch ``number`` is cached."""
        return [module for module in modules if (module, number) in self._sizes]

    @contextmanager
    def caching(self, modules: Sequence[nn.Module], number: int, watcher: Watcher) -> Iterator[None]:
        """A context in which batch ``number`` runs and outputs are cached.

        Args:
            modules: finished modules.
            number: index of the batch.
            watcher: watches the layers still to be pruned.
        """

        versions: dict[nn.Module, tuple[torch.Tensor, int]] = {}
        dropped: set[nn.Module] = set()

        def cache(module: nn.Module, _args: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            if module in versions:
                dropped.add(module)
            elif not watcher.has_read and values and isinstance(values[0], torch.Tensor):
                versions[module] = values[0], version_of(values[0])
                self._tensors[module, number] = values[0]
                self._sizes[module, number] = len(values) if isinstance(output, tuple) else None

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(cache).remove)
            yield
        dropped |= {module for module, (tensor, version) in versions.items() if version_of(tensor) != version}
        for module in dropped:
            del self._tensors[module, number], self._sizes[module, number]

    @contextmanager
    def reusing(self, modules: Sequence[nn.Module], number: int) -> Iterator[None]:
        """A context in which the modules return their cached outputs for batch ``number``, for any arguments."""
        with ExitStack() as replaced:
            for module in modules:
                tensor, size = self._tensors[module, number], self._sizes[module, number]
                replaced.enter_context(forward_replaced(module, returning(in_tuple(tensor, size))))
            yield


def in_tuple(tensor: torch.Tensor, size: int | None) -> Any:
    """A tensor as the first member of a tuple of this size, with None for the others; the tensor alone for None."""
    return tensor if size is None else (tensor, *[None] * (size - 1))


def returning(output: Any) -> Callable[..., Any]:
    """A forward that returns ``output`` for any arguments."""
    return lambda *_args, **_kwargs: output


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which ``forward`` replaces the module's own forward."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]

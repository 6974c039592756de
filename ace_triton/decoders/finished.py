"""Caches outputs of a block's fully pruned modules, so that later runs of the block need not compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .watcher import Watcher


class FinishedOutputs:
    """Cached outputs of the finished modules of one block, by module and batch.

    An output is cached only if the module ran before every layer still to be pruned, so later pruning cannot change it.
    If a module returns a tuple, only its first tensor is cached; the rest is replaced by None (attention weights, which
    blocks rarely read). The cached outputs of attention take as much memory as the calibration set's hidden states.
    """

    def __init__(self) -> None:
        self._cache: dict[nn.Module, dict[int, Any]] = {}

    def clear(self) -> None:
        """Remove all outputs from the cache."""
        self._cache.clear()

    def cached_for(self, modules: Sequence[nn.Module], number: int) -> list[nn.Module]:
        """Those of ``modules`` whose output for batch ``number`` is cached."""
        return [module for module in modules if number in self._cache.get(module, ())]

    @contextmanager
    def caching(self, modules: Sequence[nn.Module], number: int, watcher: Watcher) -> Iterator[None]:
        """A context in which batch ``number`` runs and outputs are cached.

        Args:
            modules: finished modules.
            number: index of the batch.
            watcher: watches the layers still to be pruned.
        """

        def cache(module: nn.Module, _args: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            if not watcher.has_read and values and isinstance(values[0], torch.Tensor):
                cached = (values[0], *[None] * (len(values) - 1)) if isinstance(output, tuple) else output
                self._cache.setdefault(module, {})[number] = cached

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(cache).remove)
            yield

    @contextmanager
    def reusing(self, modules: Sequence[nn.Module], number: int) -> Iterator[None]:
        """A context in which the modules return their cached outputs for batch ``number``, for any arguments."""
        with ExitStack() as replaced:
            for module in modules:
                replaced.enter_context(forward_replaced(module, _returning(self._cache[module][number])))
            yield


def _returning(output: Any) -> Callable[..., Any]:
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

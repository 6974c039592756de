"""Restores a model's loaded weights if its own forward changes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError
from ..tied import memory_of

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def weights_as_loaded(model: nn.Module, *, restorable: bool = True) -> Iterator[None]:
    """A context in which the model may run; at exit, changes that the model made to its own weights are reverted.

    RWKV divides some weights by powers of two in its first forward, in place, and records that in an attribute. At exit
    those weights, pruned or not, are multiplied by the same powers, which is exact. Plain attributes (numbers, flags,
    strings) of the modules are restored.

    Args:
        model: the model.
        restorable: False if the end of the context may never come, because a killed run would be resumed; then every
            change is an error.

    Raises:
        ArgumentError: raised by the model's first forward in the context if a parameter changed other than by a power
            of two, or at all if it is not ``restorable``. The weights are restored first.
    """
    guard = _Guard(model, restorable)
    own = vars(model).get("forward")
    forward = model.forward
    if callable(forward):
        model.forward = guard.guarded(forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is not None:
            model.forward = own  # type: ignore[method-assign]
        else:
            vars(model).pop("forward", None)
        guard.restore()


class _Guard:
    """Records the changes that the first forward of a model makes to its weights."""

    def __init__(self, model: nn.Module, restorable: bool) -> None:
        self._restorable = restorable
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._plain = {module: _plain_attributes(module) for module in model.modules()}
        self._factors: dict[nn.Parameter, float] = {}
        self._has_run = False

    def guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward, with the writes of its first call recorded."""

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._has_run:
                return forward(*args, **kwargs)
            with Writes(self._names) as writes:
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._find_factors(writes.before)

        return recorded

    def _find_factors(self, before: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter, loaded in before.items():
            factor = _power_of_two(parameter.detach(), loaded)
            if factor is None or (factor != 1 and not self._restorable):
                self._factors.clear()
                for changed, dense in before.items():
                    changed.data.copy_(dense)
                self._reset_attributes()
                raise ArgumentError(
                    f"{self._names[parameter]} is changed by the model's own forward, so the pruned weights would "
                    "differ from the loaded ones; use method='magnitude', or prune_linear for each layer"
                    if factor is None
                    else f"{self._names[parameter]} is rescaled by the model's own forward, so its weights cannot be "
                    "pruned in files: load the whole model into memory, without --stream or device_map"
                )
            if factor != 1:
                self._factors[parameter] = factor
        self._has_run = True

    def restore(self) -> None:
        """Revert the changes."""
        for parameter, factor in self._factors.items():
            parameter.data.div_(factor)
        if self._factors:
            self._reset_attributes()

    def _reset_attributes(self) -> None:
        for module, values in self._plain.items():
            for name, value in values.items():
                if vars(module).get(name) != value:
                    setattr(module, name, value)


class Writes(TorchDispatchMode):
    """Copies each parameter before the first operation in the context that writes to it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.before: dict[nn.Parameter, torch.Tensor] = {}
        self._by_memory: dict[object, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.add(parameter)

    def add(self, parameter: nn.Parameter) -> None:
        """Watch a parameter at its present memory, which may have changed since it was added."""
        self._by_memory.setdefault(memory_of(parameter), []).append(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for place, name in _written_arguments(func):
            value = args[place] if place < len(args) else (kwargs or {}).get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, torch.Tensor):
                    continue
                memory = memory_of(tensor)
                for parameter in self._by_memory.get(memory, ()):
                    # Memory that a parameter has left may belong to any other tensor.
                    if parameter not in self.before and memory_of(parameter) == memory:
                        self.before[parameter] = parameter.detach().clone()
        return func(*args, **(kwargs or {}))


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that a torch operation writes to."""
    schema = getattr(func, "_schema", None)
    arguments = enumerate(schema.arguments) if schema is not None else ()
    return tuple((place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _power_of_two(after: torch.Tensor, before: torch.Tensor) -> float | None:
    """The power of two by which a tensor was multiplied, or None if dividing by it does not restore every bit."""
    if torch.equal(after, before):
        return 1.0
    largest = before.abs().argmax()
    factor = float(after.flatten()[largest]) / (float(before.flatten()[largest]) or math.nan)
    if not (0 < factor < math.inf and math.frexp(factor)[0] == 0.5):
        return None
    return factor if torch.equal(before * factor, after) and torch.equal(after / factor, before) else None


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if n != "training" and isinstance(v, _PLAIN)}

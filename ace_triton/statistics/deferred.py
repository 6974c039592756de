"""Numbers that stay on the device until they are read, so that collecting statistics does not wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, overload

import torch

from ..kernels.token_statistics import NUMBERS

T = TypeVar("T")


class HasDeferred(Protocol):
    """An object with :class:`Deferred` attributes."""

    def read_deferred(self) -> None:
        """Read the values from the device and set the attributes."""

    def numbers_on_device(self) -> torch.Tensor | None:
        """The values that were not read yet, fp64 [n]; None if there are none."""

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Set the attributes to values that were read."""


def read_together(holders: Iterable[HasDeferred]) -> None:
    """Read the values of several objects, which waits for the device once."""
    unread = [(holder, numbers) for holder in holders if (numbers := holder.numbers_on_device()) is not None]
    read = torch.cat([numbers for _, numbers in unread]).tolist() if unread else []
    for holder, numbers in unread:
        own, read = read[: len(numbers)], read[len(numbers) :]
        holder.set_numbers(own)


class Deferred(Generic[T]):
    """A dataclass attribute whose value is read from the device on first access."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> T: ...
    @overload
    def __get__(self, holder: HasDeferred, owner: type) -> T: ...
    def __get__(self, holder: HasDeferred | None, owner: type) -> T:
        if holder is None:
            return self._default
        holder.read_deferred()
        value: T = vars(holder)[self._name]
        return value

    def __set__(self, holder: HasDeferred, value: T) -> None:
        vars(holder)[self._name] = value


class DeviceCounts(NamedTuple):
    """Count and unit of token-weighted statistics, on their device.

    Attributes:
        counted: 0-d, number of tokens with a weight.
        unit: 0-d fp64, the numerator of the token weights.
        finite: 0-d, true if all outputs were finite.
        sums: the running sums that :func:`~ace_triton.kernels.token_statistics.token_statistics` returned for several
            layers, if the counts are from there.
        row: the layer's row in ``sums``.
        square: the layer's vector in ``sums``, fp64 [in_features].
    """

    counted: torch.Tensor
    unit: torch.Tensor
    finite: torch.Tensor
    sums: torch.Tensor | None = None
    row: int = 0
    square: torch.Tensor | None = None

    @classmethod
    def of(cls, count: int, unit: float, device: torch.device) -> DeviceCounts:
        """From numbers on the host; the device itself fills the tensors, so nothing is copied."""
        return cls(
            torch.full((), count, dtype=torch.int64, device=device),
            torch.full((), unit, dtype=torch.float64, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )

    @classmethod
    def of_sums(cls, sums: torch.Tensor, row: int, in_features: int) -> DeviceCounts:
        """From the running sums of a layer."""
        counted, unit, finite, *_ = sums[row, :NUMBERS].unbind()
        return cls(counted, unit, finite, sums, row, sums[row, NUMBERS : NUMBERS + in_features])

    def add(self, level: torch.Tensor, used: torch.Tensor) -> DeviceCounts:
        """The counts with one more batch. The first batch with a used token sets the unit.

        Args:
            level: 0-d fp64, the mean squared output norm of the batch.
            used: bool, True for each token that gets a weight.
        """
        unit = torch.where(self.counted > 0, self.unit, torch.where(level == 0, 1.0, level))
        return DeviceCounts(self.counted + used.sum(), unit, self.finite * level.isfinite())

    @property
    def numbers(self) -> torch.Tensor:
        """Count, unit and whether all outputs were finite, fp64 [3]."""
        if self.sums is not None:
            return self.sums[self.row, :3]
        return torch.stack([self.counted.double(), self.unit, self.finite.double()])


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """True if the tensor is on the CPU, so that reading a number does not wait."""
    return tensor.device.type == "cpu"

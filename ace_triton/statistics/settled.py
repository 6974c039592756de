"""Numbers of statistics that stay on the device until somebody reads them, so that collecting does not wait for it."""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar, overload

import torch

T = TypeVar("T")


class Settles(Protocol):
    """What has :class:`Settled` attributes."""

    def settle(self) -> None:
        """Read from the device what is still there."""


class Settled(Generic[T]):
    """An attribute of a dataclass that is read from the device when it is asked for, and not before."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> T: ...
    @overload
    def __get__(self, holder: Settles, owner: type) -> T: ...
    def __get__(self, holder: Settles | None, owner: type) -> T:
        if holder is None:
            return self._default
        holder.settle()
        value: T = vars(holder)[self._name]
        return value

    def __set__(self, holder: Settles, value: T) -> None:
        vars(holder)[self._name] = value


class Tally(NamedTuple):
    """Of token-weighted statistics, on their device.

    Attributes:
        counted: 0-d int64, tokens.
        unit: 0-d fp64, what token weights are relative to.
        finite: 0-d bool, whether all outputs were.
    """

    counted: torch.Tensor
    unit: torch.Tensor
    finite: torch.Tensor

    @classmethod
    def of(cls, count: int, unit: float, device: torch.device) -> Tally:
        """Of numbers that are known, written by the device itself."""
        return cls(
            torch.full((), count, device=device),
            torch.full((), unit, dtype=torch.float64, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )

    def add(self, level: torch.Tensor, used: torch.Tensor) -> Tally:
        """With a batch of mean ``level``, fp64, of which ``used`` tokens count; the first that count set the unit."""
        unit = torch.where(self.counted > 0, self.unit, torch.where(level == 0, 1.0, level))
        return Tally(self.counted + used.sum(), unit, self.finite & level.isfinite())

    def read(self) -> tuple[int, float, bool]:
        """On the host, which waits for it."""
        counted, unit, finite = torch.stack([number.double() for number in self]).tolist()
        return int(counted), unit, bool(finite)


def is_at_hand(tensor: torch.Tensor) -> bool:
    """Whether reading a number of ``tensor`` waits for nothing."""
    return tensor.device.type == "cpu"

"""Moments of each channel of a layer's input: mean, variance, and squared norms per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ..errors import StatsError
from ..kernels.backend import backend_of_device
from ..kernels.moments import moments
from ..kernels.token_statistics import RunningMoments, TokenStatistics, no_moments, token_statistics
from .deferred import Deferred, read_together
from .statistic import Saved, Statistic, TensorForm, register_statistic

ROUNDING = 1e-5
"""Relative rounding error of a sum of squares in fp32."""


@register_statistic("moments", words="channel moments")
@dataclass
class ChannelMoments(Statistic):
    """Mean, sum of squared deviations and sums of squares per sequence of each channel, streamed and mergeable.

    Attributes:
        in_features: number of channels.
        count: tokens seen, padding left out.
        mean, deviation: fp64 [in_features], mean of x and sum of squared deviations from it; None before the first
            update.
        squares: sums of x^2 over each sequence, fp32 [n, in_features], as batches gave them.
        counts: tokens of each sequence, int64 [n], as batches gave them.
    """

    in_features: int
    count: Deferred[int] = Deferred(0)  # noqa: RUF009 (a descriptor)
    mean: torch.Tensor | None = None
    deviation: torch.Tensor | None = None
    squares: tuple[torch.Tensor, ...] = ()
    counts: tuple[torch.Tensor, ...] = ()
    running: RunningMoments | None = field(default=None, init=False, repr=False, compare=False)
    """Count, mean and deviation as a kernel returned them."""
    unread: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)
    """The count on the device, while the host does not know it; None afterwards."""

    forms: ClassVar = {
        "mean": TensorForm("j", (torch.float64,), signed=True),
        "deviation": TensorForm("j", (torch.float64,), signed=True),
        "sequence_square": TensorForm("sj"),
        "sequence_count": TensorForm("s", (torch.int64,)),
    }
    file_prefix: ClassVar = ""

    @torch.no_grad()
    def update(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add a batch."""
        if backend_of_device(tokens.device) == "triton" and tokens.numel():
            found = token_statistics(tokens, valid, self.before(tokens))
            self.set_running(found, None if valid is not None else tokens.shape[:-1].numel())
            return
        batch = moments(tokens, valid)
        mean = batch.total / max(batch.count, 1)
        both = self + ChannelMoments(
            self.in_features, batch.count, mean, batch.deviation, (batch.sequence_square,), (batch.sequence_count,)
        )
        self.count, self.mean, self.deviation = both.count, both.mean, both.deviation
        self.squares, self.counts = both.squares, both.counts

    def before(self, tokens: torch.Tensor) -> RunningMoments:
        """The running moments to which a kernel adds ``tokens``."""
        if self.mean is None or self.deviation is None:
            return no_moments(self.in_features, tokens.device)
        known = self.running
        if known is not None and known.mean is self.mean and known.deviation is self.deviation:
            return known
        count = torch.full((1,), self.count, dtype=torch.float64, device=tokens.device)
        return RunningMoments(count, self.mean, self.deviation)

    def set_running(self, found: TokenStatistics, n_tokens: int | None) -> None:
        """Take over what a kernel computed.

        Args:
            found: the moments of all batches, and the squares of the new one.
            n_tokens: number of tokens of the batch; None if only the device knows it, since some are padding.
        """
        if n_tokens is None or self.unread is not None:
            self.unread = found.moments.count
        else:
            self.count += n_tokens
        self.running, self.mean, self.deviation = found.moments, found.moments.mean, found.moments.deviation
        self.squares, self.counts = (*self.squares, found.sequence_square), (*self.counts, found.sequence_count)

    def read_deferred(self) -> None:
        """Read the count from the device."""
        read_together([self])

    def numbers_on_device(self) -> torch.Tensor | None:
        """The count, if it was not read yet."""
        return self.unread

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Set the count."""
        self.unread, self.count = None, int(numbers[0])

    def __add__(self, other: ChannelMoments) -> ChannelMoments:
        """The moments of the tokens of both (Chan, Golub and LeVeque's rule for the variance)."""
        squares, counts = self.squares + other.squares, self.counts + other.counts
        if self.mean is None or self.deviation is None:
            return replace(other, squares=squares, counts=counts)
        if other.mean is None or other.deviation is None or other.count == 0:
            return replace(self, squares=squares, counts=counts)
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / total)
        deviation = self.deviation + other.deviation + delta.square() * (self.count * other.count / total)
        return ChannelMoments(self.in_features, total, mean, deviation, squares, counts)

    def reordered(self, order: torch.Tensor) -> ChannelMoments:
        """A copy with reordered channels."""
        return replace(
            self,
            mean=None if self.mean is None else self.mean[order],
            deviation=None if self.deviation is None else self.deviation[order],
            squares=tuple(square[:, order] for square in self.squares),
        )

    def to(self, device: torch.device | str) -> ChannelMoments:
        """A copy on ``device``."""
        return replace(
            self,
            mean=None if self.mean is None else self.mean.to(device),
            deviation=None if self.deviation is None else self.deviation.to(device),
            squares=tuple(square.to(device) for square in self.squares),
            counts=tuple(count.to(device) for count in self.counts),
        )

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return sum(len(count) for count in self.counts)

    @property
    def sequence_square(self) -> torch.Tensor:
        """Sum of x^2 over each sequence, fp32 [n_sequences, in_features]."""
        self.squares = (torch.cat(self.squares),) if len(self.squares) > 1 else self.squares
        if self.squares:
            return self.squares[0]
        return torch.zeros(0, self.in_features, dtype=torch.float32, device="cpu")

    @property
    def sequence_count(self) -> torch.Tensor:
        """Number of tokens in each sequence, int64 [n_sequences]."""
        return torch.cat(self.counts) if self.counts else torch.zeros(0, dtype=torch.int64, device="cpu")

    @classmethod
    def load(cls, saved: Saved) -> ChannelMoments:
        """The moments from a file."""
        of = saved.tensors
        # In a channel with constant values, rounding can make the sum of squared deviations slightly negative.
        if bool((of["deviation"] < -ROUNDING * saved.count * of["mean"].square()).any()):
            raise StatsError("deviation holds negative values")
        counted = int(of["sequence_count"].sum())
        if counted != saved.count:
            raise StatsError(f"the sum of sequence_count is {counted} tokens, but count is {saved.count}")
        squares, counts = (of["sequence_square"],), (of["sequence_count"],)
        return cls(saved.in_features, saved.count, of["mean"], of["deviation"], squares, counts)

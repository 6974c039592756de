"""Statistics of a layer's inputs on the calibration text.

There is one :class:`ActivationStats` per distinct input. Layers that read the same tokens (q, k and v; gate and up)
share it. Statistics that depend on a layer's outputs (CosP's token weights) are in an :class:`OutputStats`, one per
layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Generic, Self, cast, overload

import torch

from ..errors import StatsError
from ..kernels.column_scale import CheckedScale, ColumnScale, checked_column_scale
from ..kernels.finite_check import FiniteCheck
from ..kernels.memory import why_not_plain
from . import file as stats_file
from .batch import add_batch
from .channel_moments import ChannelMoments
from .gram import Gram
from .outputs import OutputStats, Reduce
from .statistic import Kind, Statistic, check_registered, input_statistics
from .token_sample import TokenSample


class _Part(Generic[Kind]):
    """An attribute that holds the part of one kind, or None."""

    def __init__(self, kind: type[Kind]) -> None:
        self._kind = kind

    @overload
    def __get__(self, holder: None, owner: type) -> Self: ...
    @overload
    def __get__(self, holder: ActivationStats, owner: type) -> Kind | None: ...
    def __get__(self, holder: ActivationStats | None, owner: type) -> Self | Kind | None:
        return self if holder is None else cast("Kind | None", holder.parts.get(self._kind))

    def __set__(self, holder: ActivationStats, part: Kind | None) -> None:
        if part is None:
            holder.parts.pop(self._kind, None)
        else:
            holder.parts[self._kind] = part


class ActivationStats:
    """Statistics of one distinct input, streamed and mergeable.

    It consists of parts, one per kind of statistic: the channel moments, which are always there, and others as a metric
    needs them. The tokens may be split in any way over calls of :meth:`update`, and over objects joined by
    :meth:`merge`. The result is the same to a relative difference of about 1e-6.

    Attributes:
        in_features: number of channels.
        parts: the statistics, by their class.
        finite: which vectors of :meth:`derive` are known to be valid terms of a score.
        count: tokens seen, padding left out.
        mean, deviation: fp64 [in_features], mean of x and sum of squared deviations from it.
        sequence_square: fp32 [n_sequences, in_features], sum of x^2 over each sequence.
        sequence_count: int64 [n_sequences], tokens of each sequence.
        outputs: statistics that depend on one layer's outputs, or None.
        consumer_norm: fp32 [out_features], for a gate or up projection, if the metric needs it (DaSS does): the input
            norms of the layer that reads its outputs (down_proj). None for other layers.
        gram: the input's Gram matrix, for weight updates, or None.
        sample: some of the tokens, for ``update="rescale"``, or None.
    """

    outputs = _Part(OutputStats)
    gram = _Part(Gram)
    sample = _Part(TokenSample)

    def __init__(
        self,
        in_features: int,
        count: int = 0,
        mean: torch.Tensor | None = None,
        deviation: torch.Tensor | None = None,
        outputs: OutputStats | None = None,
        consumer_norm: torch.Tensor | None = None,
        gram: Gram | None = None,
        sample: TokenSample | None = None,
        *,
        parts: Iterable[Statistic] = (),
    ) -> None:
        given = [ChannelMoments(in_features, count, mean, deviation), outputs, gram, sample, *parts]
        for part in given:
            if part is not None:
                check_registered(type(part))
        self.in_features = in_features
        self.consumer_norm = consumer_norm
        self.parts: dict[type[Statistic], Statistic] = {type(part): part for part in given if part is not None}
        self.finite = FiniteCheck()
        self._derived: dict[Hashable, torch.Tensor] = {}

    def __repr__(self) -> str:
        parts = ", ".join(map(repr, self.parts.values()))
        return f"{type(self).__name__}({self.in_features}, consumer_norm={self.consumer_norm}, parts=[{parts}])"

    @classmethod
    def from_tokens(
        cls,
        tokens: torch.Tensor,
        *,
        layer: torch.nn.Module | None = None,
        valid: torch.Tensor | None = None,
        reduce: Reduce | None = None,
        gram: bool = False,
        sample: bool = False,
        parts: Iterable[type[Statistic]] = (),
    ) -> ActivationStats:
        """Statistics of one tensor of tokens.

        Args:
            tokens: [n_tokens, in_features] as one sequence, or [n_sequences, length, in_features].
            layer: the layer that reads the tokens. Its outputs are computed for CosP. By default, only inputs are used.
            valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out (padding).
            reduce: "abs" or "rms": also keep the matrix of the published CosP loss; needs ``layer``.
            gram: also keep the Gram matrix, for ``update="lstsq"`` and SparseGPT.
            sample: also keep some of the tokens, for ``update="rescale"``.
            parts: other statistics to keep: classes that are registered with
                :func:`~ace_triton.statistics.statistic.register_statistic`.
        """
        width = tokens.shape[-1] if tokens.dim() else 0
        stats = cls(width, gram=Gram(width) if gram else None, sample=TokenSample(width) if sample else None)
        stats.parts |= {kind: kind(width) for kind in input_statistics(parts)}
        if layer is None:
            stats.update(tokens, valid=valid)
            return stats
        stats.outputs = OutputStats(reduce)
        with torch.no_grad():
            stats.update(tokens, outputs=layer(tokens), valid=valid)
        return stats

    def part(self, kind: type[Kind]) -> Kind:
        """The statistic of one class; StatsError if it was not collected."""
        if kind not in self.parts:
            name = getattr(kind, "words", kind.__name__)
            raise StatsError(
                f"these statistics do not include {name}: pass raw tokens, or collect with "
                f"ActivationStats.from_tokens(tokens, parts=[{kind.__name__}])"
            )
        return cast("Kind", self.parts[kind])

    @torch.no_grad()
    def update(
        self, tokens: torch.Tensor, *, outputs: torch.Tensor | None = None, valid: torch.Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            tokens: [n_tokens, in_features] as one sequence, or [n_sequences, length, in_features]; fp32,
                fp16 or bf16.
            outputs: the layer's outputs for these tokens; required if :attr:`outputs` is set.
            valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out.

        Raises:
            StatsError: the tokens have another width, another device or no memory; or outputs are missing, have another
                shape, or are not finite. Nothing was added.
        """
        self._check_tokens(tokens)
        if (self.outputs is None) != (outputs is None):
            raise StatsError(
                "these statistics include a layer's outputs: pass outputs= with every batch"
                if outputs is None
                else "outputs were given, but these statistics do not include outputs: create them with layer="
            )
        self._update_parts(tokens, valid, None if outputs is None else [outputs])

    @torch.no_grad()
    def update_without_moments(self, tokens: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add a batch to all parts but the moments, which :meth:`add_with_outputs` then adds."""
        self._check_tokens(tokens)
        self._update_parts(tokens, valid, None, moments=False)

    @torch.no_grad()
    def add_with_outputs(
        self,
        stats: Sequence[OutputStats],
        tokens: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        valid: torch.Tensor | None,
    ) -> None:
        """Add a batch to the moments, and the outputs of the layers that read it to ``stats``, one for each layer."""
        add_batch(self._moments, stats, tokens, outputs, valid)
        self._forget_derived()

    def _update_parts(
        self,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        outputs: Sequence[torch.Tensor] | None,
        *,
        moments: bool = True,
    ) -> None:
        """Update the parts; all of them as before if one refuses the batch."""
        before = {kind: copy.copy(part) for kind, part in self.parts.items() if not part.in_place}
        try:
            self._update_each(tokens, valid, outputs, moments)
        except BaseException:
            self.parts |= before
            raise
        self._forget_derived()

    def _update_each(
        self, tokens: torch.Tensor, valid: torch.Tensor | None, outputs: Sequence[torch.Tensor] | None, moments: bool
    ) -> None:
        """Those that change a tensor in place come last, when no other part can refuse the batch."""
        together = {ChannelMoments, OutputStats}
        for kind, part in self.parts.items():
            if not part.in_place and kind not in together:
                part.update(tokens, valid)
        if moments:
            stats = [] if self.outputs is None else [self.outputs]
            add_batch(self._moments, stats, tokens, outputs or [], valid)
        for part in self.parts.values():
            if part.in_place:
                part.update(tokens, valid)

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        """Raise StatsError if the tokens cannot be added."""
        if (why := why_not_plain(tokens)) is not None:
            raise StatsError(f"the tokens' tensor {why}")
        if tokens.is_meta:
            raise StatsError("tokens are on the meta device and have no values: pass real tokens")
        if tokens.dim() not in (2, 3):
            raise StatsError(
                f"tokens must be [n_tokens, {self.in_features}] or [n_sequences, length, {self.in_features}], got "
                f"{tuple(tokens.shape)}"
            )
        if tokens.shape[-1] != self.in_features:
            raise StatsError(f"tokens have {tokens.shape[-1]} channels, these statistics {self.in_features}")
        if self.mean is not None and self.mean.device != tokens.device:
            raise StatsError(
                f"tokens are on {tokens.device}, these statistics on {self.mean.device}: use stats.to(device)"
            )

    def merge(self, other: ActivationStats) -> None:
        """Add the tokens of ``other``.

        Raises:
            StatsError: the other statistics have other parts, or are on another device. Nothing was added.
        """
        if other.in_features != self.in_features:
            raise StatsError(f"statistics of {self.in_features} and {other.in_features} channels do not merge")
        for kind in {**self.parts, **other.parts}:
            if (kind in self.parts) != (kind in other.parts):
                raise StatsError(f"statistics with and without {kind.words} do not merge")
        if self.mean is not None and other.mean is not None and self.mean.device != other.mean.device:
            raise StatsError(
                f"statistics on {self.mean.device} and {other.mean.device} do not merge: use other.to(device)"
            )
        merged = {kind: part + other.parts[kind] for kind, part in self.parts.items()}
        if other.count:
            self.parts = merged
            self._forget_derived()

    def reorder(self, order: torch.Tensor) -> None:
        """Reorder the channels: position p gets channel ``order[p]``, int64 [in_features].

        All parts are reordered. :attr:`consumer_norm` belongs to the layer's outputs and does not change.
        """
        self.parts = {kind: part.reordered(order) for kind, part in self.parts.items()}
        self._forget_derived()

    @property
    def _moments(self) -> ChannelMoments:
        return self.part(ChannelMoments)

    @property
    def count(self) -> int:
        """Tokens seen, padding left out."""
        return self._moments.count

    @property
    def mean(self) -> torch.Tensor | None:
        """Mean of x, fp64 [in_features]; None before the first update."""
        return self._moments.mean

    @property
    def deviation(self) -> torch.Tensor | None:
        """Sum of squared deviations from the mean, fp64 [in_features]; None before the first update."""
        return self._moments.deviation

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return self._moments.n_sequences

    @property
    def sequence_square(self) -> torch.Tensor:
        """Sum of x^2 over each sequence, fp32 [n_sequences, in_features]."""
        return self._moments.sequence_square

    @property
    def sequence_count(self) -> torch.Tensor:
        """Number of tokens in each sequence, int64 [n_sequences]."""
        return self._moments.sequence_count

    @property
    def norm(self) -> torch.Tensor:
        """Wanda's n_j = sqrt(sum_t x_tj^2 / n_sequences), fp32 [in_features]."""
        return self.derive("norm", self._norm)

    def _norm(self) -> CheckedScale:
        self.require_tokens()
        assert self.mean is not None
        assert self.deviation is not None
        square = torch.addcmul(self.deviation, self.mean, self.mean, value=self.count)
        return checked_column_scale(ColumnScale(square, self.n_sequences))

    def derive(self, key: Hashable, compute: Callable[[], torch.Tensor | CheckedScale]) -> torch.Tensor:
        """A vector computed from these statistics, cached for all layers that share them."""
        if key not in self._derived:
            found = compute()
            if isinstance(found, CheckedScale):
                self._derived[key] = found.scale
                self.finite.record(terms=[found.scale], flags=found.not_finite)
            else:
                self._derived[key] = found
                self.finite.share(found)
        return self._derived[key]

    def _forget_derived(self) -> None:
        self._derived, self.finite = {}, FiniteCheck()

    @property
    def variance(self) -> torch.Tensor:
        """Variance of x over tokens, divided by :attr:`count`, fp32 [in_features]."""
        self.require_tokens()
        assert self.deviation is not None
        return (self.deviation / self.count).float()

    @property
    def standard_deviation(self) -> torch.Tensor:
        """Square root of :attr:`variance`, fp32 [in_features]."""
        self.require_tokens()
        assert self.deviation is not None
        variance = ColumnScale(self.deviation, self.count)
        return self.derive("standard_deviation", lambda: checked_column_scale(variance))

    def require_tokens(self) -> None:
        """Raise StatsError if no token was counted."""
        if self.count == 0:
            raise StatsError("these statistics contain no token: call update() with calibration tokens first")

    def with_outputs(self, outputs: OutputStats | None) -> ActivationStats:
        """A snapshot of these statistics with the outputs of another layer; tensors are shared, not copied."""
        snapshot = copy.copy(self)
        snapshot.parts = {kind: copy.copy(part) for kind, part in self.parts.items()}
        snapshot.outputs = outputs
        return snapshot

    def to(self, device: torch.device | str) -> ActivationStats:
        """A copy on ``device``."""
        norm = None if self.consumer_norm is None else self.consumer_norm.to(device)
        parts = [part.to(device) for part in self.parts.values()]
        return ActivationStats(self.in_features, consumer_norm=norm, parts=parts)

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file (:mod:`ace_triton.statistics.file`).

        Raises:
            StatsError: no token was counted, or the file cannot be written.
        """
        self.require_tokens()
        parts = tuple(self.parts.values())
        stats_file.write(path, stats_file.Contents(self.in_features, self.count, parts, self.consumer_norm))

    @classmethod
    def load(cls, path: str | Path) -> ActivationStats:
        """Read a file that :meth:`save` wrote, onto the CPU. Every tensor is checked.

        Raises:
            StatsError: the file is missing, has another format, or its contents are inconsistent.
        """
        contents = stats_file.read(path)
        return cls(contents.in_features, consumer_norm=contents.consumer_norm, parts=contents.parts)

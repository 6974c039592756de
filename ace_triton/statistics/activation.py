"""Statistics of a layer's inputs on the calibration text.

There is one :class:`ActivationStats` per distinct input. Layers that read the same tokens (q, k and v; gate and up)
share it. Statistics that depend on a layer's outputs (CosP's token weights) are in an :class:`OutputStats`, one per
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..errors import StatsError
from ..kernels.column_scale import ColumnScale, column_scale
from ..kernels.finite import all_finite
from ..kernels.memory import why_not_plain
from ..kernels.moments import moments
from . import file as stats_file
from .gram import Gram
from .outputs import OutputStats, Reduce, update_outputs
from .token_sample import TokenSample


@dataclass
class _Derived:
    """A vector computed from statistics. ``is_term``: whether it is finite and not negative; None if not checked."""

    vector: torch.Tensor
    is_term: bool | None = None


@dataclass
class ActivationStats:
    """Channel statistics of one distinct input, streamed and mergeable.

    The tokens may be split in any way over calls of :meth:`update`, and over objects joined by :meth:`merge`. The
    result is the same to a relative difference of about 1e-6.

    Attributes:
        in_features: number of channels.
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

    in_features: int
    count: int = 0
    mean: torch.Tensor | None = None
    deviation: torch.Tensor | None = None
    outputs: OutputStats | None = None
    consumer_norm: torch.Tensor | None = None
    gram: Gram | None = None
    sample: TokenSample | None = None
    _squares: list[torch.Tensor] = field(default_factory=list, repr=False)
    _counts: list[torch.Tensor] = field(default_factory=list, repr=False)
    _derived: dict[Hashable, _Derived] = field(default_factory=dict, repr=False, compare=False)

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
    ) -> ActivationStats:
        """Statistics of one tensor of tokens.

        Args:
            tokens: [n_tokens, in_features] as one sequence, or [n_sequences, length, in_features].
            layer: the layer that reads the tokens. Its outputs are computed for CosP. By default, only inputs are used.
            valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out (padding).
            reduce: "abs" or "rms": also keep the matrix of the published CosP loss; needs ``layer``.
            gram: also keep the Gram matrix, for ``update="lstsq"`` and SparseGPT.
            sample: also keep some of the tokens, for ``update="rescale"``.
        """
        width = tokens.shape[-1] if tokens.dim() else 0
        stats = cls(width, gram=Gram(width) if gram else None, sample=TokenSample(width) if sample else None)
        if layer is None:
            stats.update(tokens, valid=valid)
            return stats
        stats.outputs = OutputStats(reduce)
        with torch.no_grad():
            stats.update(tokens, outputs=layer(tokens), valid=valid)
        return stats

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
        batch = moments(tokens, valid)
        if self.outputs is not None and outputs is not None:
            update_outputs([self.outputs], tokens, [outputs], valid)
        if self.gram is not None:
            self.gram.update(tokens, valid)
        if self.sample is not None:
            self.sample.update(tokens, valid)
        self._add(
            batch.count,
            batch.total / max(batch.count, 1),
            batch.deviation,
            batch.sequence_square,
            batch.sequence_count,
        )

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
        """Add the tokens of ``other`` (Chan, Golub and LeVeque's rule for the variance).

        Raises:
            StatsError: the other statistics have other fields, or are on another device. Nothing was added.
        """
        if other.in_features != self.in_features:
            raise StatsError(f"statistics of {self.in_features} and {other.in_features} channels do not merge")
        if (self.outputs is None) != (other.outputs is None):
            raise StatsError("statistics with and without a layer's outputs do not merge")
        if (self.gram is None) != (other.gram is None):
            raise StatsError("statistics with and without a Gram matrix do not merge")
        if (self.sample is None) != (other.sample is None):
            raise StatsError("statistics with and without a sample of tokens do not merge")
        if self.outputs is not None and other.outputs is not None:
            self.outputs.check_mergeable(other.outputs)
        if other.count == 0:
            return
        assert other.mean is not None
        assert other.deviation is not None
        if self.mean is not None and self.mean.device != other.mean.device:
            raise StatsError(
                f"statistics on {self.mean.device} and {other.mean.device} do not merge: use other.to(device)"
            )
        gram = self.gram + other.gram if self.gram is not None and other.gram is not None else self.gram
        sample = self.sample + other.sample if self.sample is not None and other.sample is not None else self.sample
        if self.outputs is not None and other.outputs is not None:
            self.outputs.merge(other.outputs)
        self.gram, self.sample = gram, sample
        self._add(other.count, other.mean, other.deviation, other.sequence_square, other.sequence_count)

    def reorder(self, order: torch.Tensor) -> None:
        """Reorder the channels: position p gets channel ``order[p]``, int64 [in_features].

        :attr:`outputs` is reordered too. :attr:`consumer_norm` belongs to the layer's outputs and does not change.
        """
        self._derived = {}
        self.mean = None if self.mean is None else self.mean[order]
        self.deviation = None if self.deviation is None else self.deviation[order]
        self._squares = [square[:, order] for square in self._squares]
        self.gram = None if self.gram is None else self.gram.reordered(order)
        self.sample = None if self.sample is None else self.sample.reordered(order)
        if self.outputs is not None:
            self.outputs.reorder(inputs=order)

    def _add(
        self,
        count: int,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        sequence_square: torch.Tensor,
        sequence_count: torch.Tensor,
    ) -> None:
        self._derived = {}
        self._squares.append(sequence_square)
        self._counts.append(sequence_count)
        if self.mean is None or self.deviation is None:
            self.count, self.mean, self.deviation = count, mean, deviation
            return
        total = self.count + count
        if count == 0:
            return
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.deviation = self.deviation + deviation + delta.square() * (self.count * count / total)
        self.count = total

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return sum(len(c) for c in self._counts)

    @property
    def sequence_square(self) -> torch.Tensor:
        """Sum of x^2 over each sequence, fp32 [n_sequences, in_features]."""
        self._squares = [torch.cat(self._squares)] if len(self._squares) > 1 else self._squares
        if self._squares:
            return self._squares[0]
        return torch.zeros(0, self.in_features, dtype=torch.float32, device="cpu")

    @property
    def sequence_count(self) -> torch.Tensor:
        """Number of tokens in each sequence, int64 [n_sequences]."""
        return torch.cat(self._counts) if self._counts else torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    def norm(self) -> torch.Tensor:
        """Wanda's n_j = sqrt(sum_t x_tj^2 / n_sequences), fp32 [in_features]."""
        return self.derive("norm", self._norm)

    def _norm(self) -> torch.Tensor:
        self.require_tokens()
        assert self.mean is not None
        assert self.deviation is not None
        square = torch.addcmul(self.deviation, self.mean, self.mean, value=self.count)
        return column_scale(ColumnScale(square, self.n_sequences))

    def derive(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A vector computed from these statistics, cached for all layers that share them."""
        if key not in self._derived:
            self._derived[key] = _Derived(compute())
        return self._derived[key].vector

    def is_term(self, vector: torch.Tensor) -> bool | None:
        """True if a vector from :meth:`derive` is finite and not negative, as a term of a score must be; cached.

        None for a vector that does not come from :meth:`derive`.
        """
        for derived in self._derived.values():
            if derived.vector is vector:
                if derived.is_term is None:
                    derived.is_term = all_finite(terms=[vector])
                return derived.is_term
        return None

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
        return self.derive("standard_deviation", lambda: column_scale(variance))

    def require_tokens(self) -> None:
        """Raise StatsError if no token was counted."""
        if self.count == 0:
            raise StatsError("these statistics contain no token: call update() with calibration tokens first")

    def with_outputs(self, outputs: OutputStats | None) -> ActivationStats:
        """A snapshot of these statistics with the outputs of another layer; tensors are shared, not copied."""
        return replace(self, outputs=outputs, _squares=list(self._squares), _counts=list(self._counts))

    def to(self, device: torch.device | str) -> ActivationStats:
        """A copy on ``device``."""
        moved = replace(
            self,
            mean=None if self.mean is None else self.mean.to(device),
            deviation=None if self.deviation is None else self.deviation.to(device),
            consumer_norm=None if self.consumer_norm is None else self.consumer_norm.to(device),
            gram=None if self.gram is None else self.gram.to(device),
            sample=None if self.sample is None else self.sample.to(device),
            _squares=[s.to(device) for s in self._squares],
            _counts=[c.to(device) for c in self._counts],
            _derived={},
        )
        if self.outputs is not None:
            o = self.outputs
            moved.outputs = replace(
                o,
                weighted_square=None if o.weighted_square is None else o.weighted_square.to(device),
                matrix=None if o.matrix is None else o.matrix.to(device),
            )
        return moved

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file (:mod:`ace_triton.statistics.file`).

        Raises:
            StatsError: no token was counted, or the file cannot be written.
        """
        self.require_tokens()
        assert self.mean is not None
        assert self.deviation is not None
        tensors = {
            "mean": self.mean,
            "deviation": self.deviation,
            "sequence_square": self.sequence_square,
            "sequence_count": self.sequence_count,
        }
        facts: dict[str, object] = {"in_features": self.in_features, "count": self.count}
        if self.consumer_norm is not None:
            tensors["consumer_norm"] = self.consumer_norm
        if self.gram is not None and self.gram.matrix is not None:
            tensors["gram"] = self.gram.matrix
        if self.sample is not None and self.sample.tokens is not None and self.sample.draws is not None:
            tensors |= {"sample": self.sample.tokens, "draws": self.sample.draws}
        if self.outputs is not None and self.outputs.weighted_square is not None:
            facts["outputs"] = {"reduce": self.outputs.reduce, "count": self.outputs.count, "unit": self.outputs.unit}
            tensors["weighted_square"] = self.outputs.weighted_square
            if self.outputs.matrix is not None:
                tensors["coupling"] = self.outputs.matrix
        stats_file.write(path, facts, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ActivationStats:
        """Read a file that :meth:`save` wrote, onto the CPU. Every tensor is checked.

        Raises:
            StatsError: the file is missing, has another format, or its contents are inconsistent.
        """
        facts, tensors = stats_file.read(path)
        outputs = None
        if "outputs" in facts:
            outputs = OutputStats(
                **facts["outputs"], weighted_square=tensors["weighted_square"], matrix=tensors.get("coupling")
            )
        seen = (facts["in_features"], facts["count"])
        return cls(
            *seen,
            tensors["mean"],
            tensors["deviation"],
            outputs,
            tensors.get("consumer_norm"),
            Gram(*seen, tensors["gram"]) if "gram" in tensors else None,
            TokenSample(*seen, tensors["sample"], tensors["draws"]) if "sample" in tensors else None,
            [tensors["sequence_square"]],
            [tensors["sequence_count"]],
        )

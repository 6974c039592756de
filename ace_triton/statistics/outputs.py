"""Statistics that depend on a layer's outputs: sums of squared inputs with CosP's token weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch

from ..errors import StatsError
from ..kernels.coupling import coupling
from ..kernels.memory import why_not_plain
from ..kernels.token_norms import token_norms
from ..kernels.token_statistics import NEGLIGIBLE_NORM
from ..kernels.weighted_squares import MOST_LAYERS, weighted_squares
from .deferred import Deferred, DeviceCounts, is_on_cpu, read_together
from .statistic import Saved, Statistic, TensorForm, is_count, register_statistic

Reduce = Literal["abs", "rms"]

NOT_FINITE = (
    "the layer's outputs hold NaN or infinity; look for overflow in the calibration forward (run it in bfloat16 or "
    "float32)"
)


@register_statistic("outputs", words="a layer's outputs")
@dataclass
class OutputStats(Statistic):
    """Token-weighted statistics of one layer, for CosP.

    s_t = sum_i a_ti^2 is the squared norm of the layer's output for token t, with bias. The token weight is
    d_t = unit / s_t.

    Attributes:
        reduce: also keep the matrix of the published loss, a mean of absolute values ("abs") or of squares ("rms").
            None keeps only the vector.
        count: number of tokens with a weight.
        unit: the mean s_t of the first batch. It keeps d_t near 1, in the range of fp16 and tf32.
        weighted_square: fp64 [in_features], sum_t d_t x_tj^2.
        matrix: fp32 [out_features, in_features], sum_t |a_ti x_tj| d_t ("abs") or its squares ("rms").
    """

    reduce: Reduce | None = None
    count: Deferred[int] = Deferred(0)  # noqa: RUF009 (a descriptor)
    unit: Deferred[float] = Deferred(0.0)  # noqa: RUF009 (a descriptor)
    weighted_square: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    on_device: DeviceCounts | None = field(default=None, init=False, repr=False, compare=False)
    """Count and unit on the device, while they are not read; None afterwards."""

    forms: ClassVar = {
        "weighted_square": TensorForm("j", (torch.float64,)),
        "coupling": TensorForm("ij", optional=True),
    }
    fact_names: ClassVar = ("reduce", "count", "unit")
    file_prefix: ClassVar = ""
    of_outputs: ClassVar = True

    def update(
        self, tokens: torch.Tensor, valid: torch.Tensor | None = None, *, outputs: torch.Tensor | None = None
    ) -> None:
        """Add a batch and the layer's outputs for it (:func:`update_outputs`)."""
        if outputs is None:
            raise StatsError("these statistics include a layer's outputs: pass outputs= with every batch")
        update_outputs([self], tokens, [outputs], valid)

    def read_deferred(self) -> None:
        """Read count and unit from the device. Nothing else here waits for a GPU.

        Raises:
            StatsError: the outputs of valid tokens hold NaN or infinity.
        """
        if self.on_device is not None:
            read_together([self])
            if self.on_device is not None:
                raise StatsError(NOT_FINITE)

    def numbers_on_device(self) -> torch.Tensor | None:
        """Count, unit and whether all outputs were finite, if they were not read yet."""
        return None if self.on_device is None else self.on_device.numbers

    def set_numbers(self, numbers: Sequence[float]) -> None:
        """Set count and unit, unless the outputs were not finite."""
        count, unit, finite = numbers
        if finite:
            self.on_device, self.count, self.unit = None, int(count), unit

    def mean_weighted_square(self) -> torch.Tensor:
        """mean_t x_tj^2 / s_t, fp64 [in_features]: the second-order term of 1 - cos."""
        square, divisor = self.weighted_square_and_divisor()
        return square / divisor

    def weighted_square_and_divisor(self) -> tuple[torch.Tensor, float]:
        """Numerator and denominator of :meth:`mean_weighted_square`."""
        assert self.weighted_square is not None
        return self.weighted_square, self.unit * max(self.count, 1)

    def mean_coupling(self) -> torch.Tensor:
        """mean_t |a_ti x_tj| / s_t for "abs", or its root mean square for "rms"; fp32 [out_features, in_features]."""
        count = max(self.count, 1)
        return self.relative_coupling() / (self.unit * (math.sqrt(count) if self.reduce == "rms" else count))

    def relative_coupling(self) -> torch.Tensor:
        """:meth:`mean_coupling` times a positive constant of the layer, so the ranking of weights is the same.

        For "abs" this is the summed matrix itself, and no kernel is launched.
        """
        self.read_deferred()
        if self.matrix is None:
            raise StatsError("these statistics have no coupling matrix: collect them with reduce='abs' or 'rms'")
        return self.matrix.sqrt() if self.reduce == "rms" else self.matrix

    def reorder(self, *, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None) -> None:
        """Reorder channels like those of the weight: position p gets channel ``inputs[p]`` or ``outputs[p]``."""
        if inputs is not None and self.weighted_square is not None:
            self.weighted_square = self.weighted_square[inputs]
        if self.matrix is not None:
            self.matrix = self.matrix if inputs is None else self.matrix[:, inputs].contiguous()
            self.matrix = self.matrix if outputs is None else self.matrix[outputs]

    def check_mergeable(self, other: OutputStats) -> None:
        """Raise StatsError if :meth:`merge` cannot add ``other``."""
        if other.reduce != self.reduce:
            raise StatsError(f"statistics with reduce={self.reduce!r} and {other.reduce!r} do not merge")
        pairs = {"channels": (self.weighted_square, other.weighted_square), "shape": (self.matrix, other.matrix)}
        for what, (mine, theirs) in pairs.items():
            if mine is not None and theirs is not None and mine.shape != theirs.shape:
                raise StatsError(
                    f"statistics of layers of different {what} do not merge: {tuple(mine.shape)} and "
                    f"{tuple(theirs.shape)}"
                )

    def merge(self, other: OutputStats) -> None:
        """Add the tokens of ``other``.

        Raises:
            StatsError: the other statistics have another shape or another ``reduce``. Nothing was added.
        """
        self.check_mergeable(other)
        if other.count == 0:
            return
        unit = self.unit if self.count else other.unit
        ratio = unit / other.unit
        assert other.weighted_square is not None
        square = other.weighted_square * ratio
        square = square if self.weighted_square is None else self.weighted_square + square
        matrix = self.matrix
        if other.matrix is not None:
            matrix = other.matrix * (ratio**2 if self.reduce == "rms" else ratio)
            matrix = matrix if self.matrix is None else self.matrix + matrix
        self.unit, self.weighted_square, self.matrix = unit, square, matrix
        self.count += other.count

    def __add__(self, other: OutputStats) -> OutputStats:
        """The statistics of the tokens of both; neither operand changes."""
        both = replace(self)
        both.merge(other)
        return both

    def reordered(self, order: torch.Tensor) -> OutputStats:
        """A copy with reordered input channels."""
        copied = replace(self)
        copied.reorder(inputs=order)
        return copied

    def to(self, device: torch.device | str) -> OutputStats:
        """A copy on ``device``."""
        return replace(
            self,
            weighted_square=None if self.weighted_square is None else self.weighted_square.to(device),
            matrix=None if self.matrix is None else self.matrix.to(device),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The vector and, with ``reduce``, the matrix; empty before the first update."""
        named = {"weighted_square": self.weighted_square, "coupling": self.matrix}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def load(cls, saved: Saved) -> OutputStats:
        """The statistics from a file."""
        facts, matrix = saved.facts, saved.tensors.get("coupling")
        _check_facts(facts)
        reduce = facts["reduce"]
        if (reduce is None) != (matrix is None):
            wanted = "no" if reduce is None else "a"
            raise StatsError(f"outputs with reduce={reduce!r} must have {wanted} coupling matrix")
        return cls(reduce, facts["count"], facts["unit"], saved.tensors["weighted_square"], matrix)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """StatsError if a value from the header of a file is invalid."""
    reduce, count, unit = facts["reduce"], facts["count"], facts["unit"]
    if reduce is not None and reduce not in get_args(Reduce):
        raise StatsError(f"reduce of outputs must be null, 'abs' or 'rms', got {reduce!r}")
    if not is_count(count):
        raise StatsError(f"count of outputs must be a whole number, 0 or more, got {count!r}")
    if isinstance(unit, bool) or not isinstance(unit, (int, float)) or not (math.isfinite(unit) and unit > 0):
        raise StatsError(f"unit of outputs must be a number above 0, got {unit!r}")


def update_outputs(
    stats: Sequence[OutputStats],
    tokens: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    valid: torch.Tensor | None = None,
) -> None:
    """Add a batch to the output statistics of all layers that read ``tokens``, in one pass over the tokens.

    Args:
        stats: one for each layer.
        tokens: [..., in_features].
        outputs: for each layer, its outputs [..., out_features] for these tokens.
        valid: bool [...], False for tokens to leave out.

    Raises:
        StatsError: the shapes of outputs and tokens do not match, or the outputs of valid tokens hold NaN or infinity.
            No statistics were changed. On a GPU, NaN and infinity raise this error only when the statistics are used.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    rows, counts = [], []
    for stat, output in zip(stats, outputs, strict=True):
        check_outputs(stat, tokens, output)
        norms = token_norms(output.reshape(-1, output.shape[-1]))
        used = torch.ones_like(norms, dtype=torch.bool) if valid is None else valid.reshape(-1)
        level = (torch.where(used, norms, 0.0).sum() / used.sum().clamp(min=1)).double()
        if is_on_cpu(level) and not level.isfinite():
            raise StatsError(NOT_FINITE)
        used = used & (norms > (NEGLIGIBLE_NORM * level).float())
        count = (stat.on_device or DeviceCounts.of(stat.count, stat.unit, level.device)).add(level, used)
        rows.append(torch.where(used, norms.reciprocal() * count.unit, 0.0))
        counts.append(count)
    for start in range(0, len(rows), MOST_LAYERS):
        stop = start + MOST_LAYERS
        sums = weighted_squares(flat, torch.stack(rows[start:stop]))
        for stat, row, count, output, weighted in zip(
            stats[start:stop], rows[start:stop], counts[start:stop], outputs[start:stop], sums.double(), strict=True
        ):
            stat.weighted_square = weighted if stat.weighted_square is None else stat.weighted_square + weighted
            if stat.reduce is not None:
                a = output.reshape(-1, output.shape[-1])
                stat.matrix = coupling(flat, a, row, stat.reduce, into=stat.matrix)
            stat.on_device = count
            if is_on_cpu(count.unit):
                stat.read_deferred()


def check_outputs(stat: OutputStats, tokens: torch.Tensor, output: torch.Tensor) -> None:
    """Raise StatsError if a layer's output does not match ``tokens``."""
    if (why := why_not_plain(output)) is not None:
        raise StatsError(f"the outputs' tensor {why}")
    if output.shape[:-1].numel() != tokens.shape[:-1].numel() or output.device != tokens.device:
        raise StatsError(
            f"outputs must have one row for each token of {tuple(tokens.shape)} and be on {tokens.device}, got "
            f"{tuple(output.shape)} on {output.device}"
        )
    if stat.matrix is not None and stat.matrix.shape[0] != output.shape[-1]:
        raise StatsError(
            f"outputs have {output.shape[-1]} channels, but these statistics have {stat.matrix.shape[0]}: pass the "
            "outputs of the same layer"
        )

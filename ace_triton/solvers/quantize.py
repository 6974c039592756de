"""Quantization of the kept weights of a pruned layer to 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from ..errors import RecipeError
from ..kernels.few_bits import as_stored, check_bits, dequantized, quantized
from ..kernels.round_groups import round_groups
from ..statistics.activation import ActivationStats
from ..threads import few_threads
from .inverse_factor import inverse_factor

Rule = Literal["absmax", "gptq"]

GROUP = 128
"""Default number of neighboring inputs of a row that share a scale."""

DAMPING = 0.01
"""Damping of the Gram matrix for "gptq", as in the published code."""

CLIPS: dict[int, tuple[float, ...]] = {8: (), 4: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
"""Shares of a group's largest magnitude that "gptq" also tries as the largest value, by number of bits."""


@dataclass(frozen=True)
class Quantization:
    """How the kept weights are quantized.

    Every ``group`` neighboring inputs of a row share a scale. The mask is fixed: pruned weights stay 0 and have no
    influence on the scale.

    Attributes:
        bits: 8 or 4.
        group: number of inputs that share a scale, a multiple of 32.
        rule: "absmax" rounds each weight to the nearest value. "gptq" (Frantar et al., arXiv 2210.17323) rounds column
            by column and changes the later columns so that they make up for the error in the layer's outputs; it needs
            the Gram matrix of the input. At 4 bits it also searches the scale of each group.
    """

    bits: int = 8
    group: int = GROUP
    rule: Rule = "gptq"

    def __post_init__(self) -> None:
        try:
            check_bits(self.bits, self.group)
        except ValueError as error:
            raise RecipeError(f"quantize: {error}") from error
        if self.rule not in get_args(Rule):
            raise RecipeError(f"quantize: rule must be one of {', '.join(get_args(Rule))}; got {self.rule!r}")

    @classmethod
    def of(cls, given: int | Mapping[str, Any] | Quantization | None) -> Quantization | None:
        """A quantization from its number of bits or from a dict like that of :meth:`to_dict`; None for none.

        Raises:
            RecipeError: a value is invalid, or the dict has an unknown entry.
        """
        if given is None or isinstance(given, Quantization):
            return given
        if isinstance(given, int):
            return cls(given)
        if not isinstance(given, Mapping):
            raise RecipeError(f"quantize must be 8, 4, an ace_triton.Quantization, a dict, or None; got {given!r}")
        known = [entry.name for entry in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise RecipeError(f"quantize has no entry {unknown[0]!r}; its entries: {', '.join(known)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        group = "" if self.group == GROUP else f" in groups of {self.group}"
        return f"{self.bits} bits{group} by {self.rule}"


def quantized_weight(
    weight: torch.Tensor, mask: torch.Tensor, stats: ActivationStats | None, by: Quantization, dtype: torch.dtype
) -> torch.Tensor:
    """The weight with its kept values quantized.

    Args:
        weight: pruned, fp32 [out_features, in_features].
        mask: bool [out_features, in_features], True where kept.
        stats: with a Gram matrix if the rule is "gptq".
        by: how to quantize.
        dtype: dtype of the model, in which the scales are kept.

    Returns:
        fp32 [out_features, in_features]. Converted to ``dtype``, packing with the same bits and group keeps each value.

    Raises:
        StatsError: the Gram matrix is missing, or no damping makes it positive definite.
    """
    if by.rule == "absmax":
        return rounded_weight(weight, by, dtype)
    assert stats is not None
    factor = stats.derive(("inverse_factor", DAMPING), lambda: inverse_factor(stats, DAMPING))
    current, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], by.group):
        block = slice(start, min(start + by.group, weight.shape[1]))
        with few_threads(weight.shape[0] * by.group):
            columns, errors = _sweep(current[:, block], mask[:, block], factor[block, block].contiguous(), by, dtype)
        result[:, block] = columns.t()
        current[:, block.stop :].addmm_(errors.t(), factor[block, block.stop :], alpha=-1)
    return result.add_(0.0)  # Makes -0.0 to +0.0, as pruned weights are.


def rounded_weight(weight: torch.Tensor, by: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """The weight with each value rounded to the nearest one of its group, whose scale is its largest magnitude.

    Args:
        weight: fp32 [out_features, in_features].
        by: bits and group; the rule has no effect.
        dtype: dtype of the model, in which the scales are kept.

    Returns:
        fp32 [out_features, in_features], as :func:`quantized_weight`. Rounding it again changes nothing.
    """
    return round_groups(weight.contiguous(), by.bits, by.group, dtype)


def _sweep(
    current: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, by: Quantization, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one group of columns.

    The largest weight of a row keeps the largest integer, whatever the other columns add to it. So the magnitude of the
    group can be read from the quantized weights.

    Returns:
        The quantized columns, and each column's error divided by its pivot: both [columns, out_features].
    """
    columns, kept = current.t().contiguous(), mask.t().contiguous()
    start = columns * kept
    largest, holder = start.abs().max(0)
    absmax = _best_clip(start, as_stored(largest, dtype), by, dtype)
    extreme = start.gather(0, holder[None])[0].sign() * absmax
    results, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j in range(len(columns)):
        column = columns[j]
        rounded = dequantized(quantized(column, absmax, by.bits), absmax, by.bits)
        result = torch.where(holder == j, extreme, rounded * kept[j])
        results[j] = result
        error = torch.div(column - result, factor[j, j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    return results, errors


def _best_clip(columns: torch.Tensor, largest: torch.Tensor, by: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """For each row, the largest value with the smallest squared error: all of ``largest`` [out_features], or a share.

    Args:
        columns: the kept weights of one group, fp32 [columns, out_features].
    """
    best, least = largest, _squared_error(columns, largest, by)
    for share in CLIPS[by.bits]:
        tried = as_stored(largest * share, dtype)
        error = _squared_error(columns, tried, by)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _squared_error(columns: torch.Tensor, absmax: torch.Tensor, by: Quantization) -> torch.Tensor:
    return (dequantized(quantized(columns, absmax, by.bits), absmax, by.bits) - columns).square_().sum(0)

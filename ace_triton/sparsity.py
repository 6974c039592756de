"""Sparsity patterns: how many weights are kept, and in which groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from .errors import PatternError
from .kernels.select_nm import GROUP_SIZES

Axis = Literal["in", "out"]
Scope = Literal["row", "layer"]


@dataclass(frozen=True)
class Sparsity:
    """A pattern: ``Sparsity("2:4")`` keeps 2 of every 4 inputs, ``Sparsity(0.5)`` prunes half of every row.

    Attributes:
        pattern: "n:m" (n of every m are **kept**), or the pruned fraction: 0.5, "0.5" or "50%".
        axis: the direction of a group or row. "in": consecutive inputs of one output, as sparse tensor cores need.
            "out": consecutive outputs of one input. None: the metric's default, which is "in" except for DaSS's gate
            and up projections.
        scope: for a fraction: "row" prunes this share of each row, "layer" this share of the whole layer, by one
            threshold.
        n, m: n of every m weights are kept; None for a fraction.
        fraction: share of weights pruned, exactly the decimal number that Python prints. So 0.29 of 100 weights is 29,
            although the float is slightly below 0.29.

    Raises:
        PatternError: if the pattern, axis or scope is invalid.
    """

    pattern: str | float = field(compare=False)
    axis: Axis | None = None
    scope: Scope = "row"
    n: int | None = field(init=False, default=None)
    m: int | None = field(init=False, default=None)
    fraction: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.axis not in (None, "in", "out"):
            raise PatternError(f"axis must be 'in', 'out' or None, got {self.axis!r}")
        if self.scope not in ("row", "layer"):
            raise PatternError(f"scope must be 'row' or 'layer', got {self.scope!r}")
        n, m, fraction = _parse(self.pattern)
        if n is not None and self.scope == "layer":
            raise PatternError(
                f"scope 'layer' needs a fraction such as 0.5; {self.pattern!r} selects weights within groups"
            )
        if self.scope == "layer" and self.axis == "out":
            raise PatternError("scope 'layer' compares all weights of the layer and has no axis: leave axis out")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)
        object.__setattr__(self, "fraction", fraction)

    @classmethod
    def of(cls, pattern: str | float | Mapping[str, Any] | Sparsity) -> Sparsity:
        """The pattern itself, or one made from text, a fraction, or a dict as :meth:`to_dict` writes it.

        Raises:
            PatternError: if the pattern is invalid, or a dict has no entry "pattern" or an unknown entry.
        """
        if isinstance(pattern, Sparsity):
            return pattern
        if isinstance(pattern, Mapping):
            known = ("pattern", "axis", "scope")
            if unknown := [name for name in pattern if name not in known]:
                raise PatternError(f"a sparsity has no entry {unknown[0]!r}; its entries: {', '.join(known)}")
            if "pattern" not in pattern:
                raise PatternError("a sparsity needs the entry 'pattern', such as \"2:4\" or 0.5")
            return cls(**pattern)
        return _of_text(pattern) if isinstance(pattern, str) else cls(pattern)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"pattern": self.pattern, "axis": self.axis, "scope": self.scope}

    def kept_of(self, size: int) -> int:
        """Number of weights kept out of ``size``. The number of pruned weights, size * fraction, is rounded down."""
        return size - int(size * _decimal(self.fraction))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.n is not None else f"{self.fraction:.4g}"


@lru_cache
def _decimal(fraction: float) -> Fraction:
    """The shortest decimal number that rounds to the float, as an exact fraction."""
    return Fraction(repr(float(fraction)))


@lru_cache
def _of_text(pattern: str) -> Sparsity:
    return Sparsity(pattern)


def _parse(pattern: str | float) -> tuple[int | None, int | None, float]:
    allowed = "give 'n:m' (n of every m kept, as '2:4') or the pruned fraction (as 0.5 or '50%')"
    if isinstance(pattern, str):
        group = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)
        if group:
            n, m = int(group[1]), int(group[2])
            if m not in GROUP_SIZES or not 0 < n < m:
                raise PatternError(f"{pattern!r}: n:m needs m in {GROUP_SIZES} and 0 < n < m; {allowed}")
            return n, m, 1 - n / m
        number = pattern.strip()
        try:
            fraction = float(_decimal(float(number[:-1])) / 100) if number.endswith("%") else float(number)
        except ValueError:
            raise PatternError(f"{pattern!r} is not a sparsity: {allowed}") from None
    elif isinstance(pattern, (int, float)) and not isinstance(pattern, bool):
        fraction = pattern
    else:
        raise PatternError(f"{pattern!r} is not a sparsity: {allowed}")
    if not 0 <= fraction < 1:
        raise PatternError(f"the pruned fraction must lie in [0, 1), got {fraction}; {allowed}")
    return None, None, float(fraction)

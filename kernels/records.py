"""Arguments of operations that their launchers and the CPU library's calls share; they depend on no backend."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from .errors import ArgumentError


@dataclass(frozen=True)
class Step:
    """Hyperparameters of one optimizer step.

    Attributes:
        rate: learning rate, 0 or more.
        number: number of the step, counted from 1.
        betas: decays of the first and the second moment, in [0, 1).
        eps: added to the square root of the second moment, above 0.

    Raises:
        ArgumentError: if a value is outside its range.
    """

    rate: float
    number: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (self.rate >= 0 and self.number >= 1 and self.eps > 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise ArgumentError(
                "an optimizer step needs a rate of at least 0, a number of at least 1, betas in [0, 1) and eps above "
                f"0; got {self}"
            )

    @property
    def scalars(self) -> tuple[float, float, float, float, float]:
        """What the kernels take: rate / (1 - b_1^t), 1 - b_1, 1 - b_2, 1 / sqrt(1 - b_2^t) and eps."""
        first, second = self.betas
        unbiased = [1 - beta**self.number for beta in self.betas]
        return self.rate / unbiased[0], 1 - first, 1 - second, 1 / math.sqrt(unbiased[1]), self.eps


@dataclass(frozen=True)
class GradientMoments:
    """Running means of the gradient (``first``) and of its square (``second``), fp32 in the shape of the values."""

    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def like(cls, values: torch.Tensor) -> GradientMoments:
        """Moments of 0, in the shape, dtype and device of ``values``."""
        return cls(torch.zeros_like(values), torch.zeros_like(values))


@dataclass(frozen=True)
class ColumnScale:
    """Inputs of the column vector; at least one of ``square``, ``base`` and ``factor`` is given.

    Attributes:
        square: fp64 [in_features], sums of squares; None to leave the factor out.
        divisor: divides ``square``. Triton multiplies by its inverse, rounded to fp32.
        base, factor: fp32 [in_features], or None for 1.
        sign: 1 multiplies by ``factor``, -1 divides by it.
        exponent: power of the whole vector: 1, 0.75 or 0.5, which need square roots only.

    Raises:
        ArgumentError: if no vector is given, or if a shape, dtype, the sign or the exponent is invalid.
    """

    square: torch.Tensor | None = None
    divisor: float = 1.0
    base: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    sign: int = 1
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ArgumentError(f"sign must be +1 or -1, got {self.sign!r}")
        if self.exponent not in (1, 0.75, 0.5):
            raise ArgumentError(f"the exponent of a column scale must be 1, 0.75 or 0.5, got {self.exponent!r}")
        vectors = self.vectors()
        if len({vector.shape for vector in vectors.values()}) != 1:
            shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
            raise ArgumentError(
                f"a column scale needs square, base or factor, all of the same length; got {shapes or 'none'}"
            )
        for name, vector in vectors.items():
            wanted = torch.float64 if name == "square" else torch.float32
            if vector.dtype != wanted or vector.dim() != 1 or not vector.is_contiguous():
                raise ArgumentError(
                    f"{name} must be a contiguous {wanted} vector, got {vector.dtype} of shape {tuple(vector.shape)}"
                )

    def vectors(self) -> dict[str, torch.Tensor]:
        """The vectors that are given, by name."""
        named = {"square": self.square, "base": self.base, "factor": self.factor}
        return {name: vector for name, vector in named.items() if vector is not None}

    def parts(self) -> tuple[torch.Tensor | None, float, torch.Tensor | None, torch.Tensor | None]:
        """The kernels' arguments: square, the inverse of its divisor, base and factor."""
        return self.square, 1 / self.divisor, self.base, self.factor

    def rounded_parts(self) -> tuple[torch.Tensor | None, float, torch.Tensor | None, torch.Tensor | None]:
        """:meth:`parts` with the inverse in fp32, as a GPU gets it. (The interpreter would use it unrounded.)"""
        square, inverse, base, factor = self.parts()
        return square, ctypes.c_float(inverse).value, base, factor

    @property
    def quarters(self) -> int:
        """The exponent in quarters, as the kernels take it."""
        return int(4 * self.exponent)

    @property
    def in_features(self) -> int:
        """Length of the vectors."""
        return next(iter(self.vectors().values())).shape[0]

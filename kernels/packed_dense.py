"""packed_dense: a weight that is not pruned, in 8 or 4 bits (:mod:`~ace_triton.kernels.few_bits`).

Layout 2 of :mod:`~ace_triton.kernels.packed_nm` without metadata, for any weight [out, in]:

    values of 8 bits [out, in], int8: the integers q
    values of 4 bits [out, ceil(in / 2)], uint8: q in 4 bits, in two's complement, two in a byte, the first one in the
        lower bits; a last half byte that no value needs is 0
    absmax [out, ceil(in / group)], float32, float16 or bfloat16: the largest magnitude among ``group`` inputs

Bytes per weight of b bits, if absmax has e bytes: b / 8 + e / group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from . import few_bits
from .errors import ArgumentError

ELEMENTS_AT_ONCE = 1 << 22
"""Rows are quantized in parts of about this many weights, because a part is held in fp32 several times."""


@dataclass(frozen=True)
class PackedDense:
    """A quantized weight [out, in] (see the module's docstring).

    Attributes:
        values: int8 [out, in] (8 bits), or uint8 [out, ceil(in / 2)] (4 bits), contiguous.
        absmax: [out, ceil(in / group)], contiguous, on the device of ``values``.
        shape: (out, in) of the weight.
        group: number of inputs that share an entry of ``absmax``.
    """

    values: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    group: int

    n: ClassVar[int] = 1
    m: ClassVar[int] = 1
    meta: ClassVar[None] = None
    """As in ``PackedNM``, for kernels that take both: every input has a value."""

    @classmethod
    def empty(
        cls, shape: tuple[int, int], bits: int, group: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> PackedDense:
        """A quantized weight with uninitialized tensors; ``dtype`` is that of the weight."""
        rows, cols = shape
        stored = torch.int8 if bits == 8 else torch.uint8
        values = torch.empty(rows, cols if bits == 8 else -(-cols // 2), dtype=stored, device=device)
        return cls(values, torch.empty(rows, -(-cols // group), dtype=dtype, device=device), shape, group)

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight, and of the tokens that it multiplies."""
        return self.absmax.dtype

    @property
    def kept_of_a_row(self) -> int:
        """The number of values in a row."""
        return self.shape[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {"values": self.values, "absmax": self.absmax}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> PackedDense:
        """A weight of the same kind with other :attr:`tensors`; it may have another number of rows."""
        return PackedDense(**tensors, shape=(len(tensors["values"]), self.shape[1]), group=self.group)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight in its own dtype."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + self.absmax.nbytes

    def to(self, device: torch.device | str) -> PackedDense:
        """The weight on ``device``."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def outputs(self, first: int, last: int) -> PackedDense:
        """The weight of outputs ``first`` to ``last`` (exclusive); it shares memory with this one."""
        return self.with_tensors({name: tensor[first:last] for name, tensor in self.tensors.items()})

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows with these indices [...], in the weight's dtype: [..., in]."""
        flat = indices.flatten()
        some = self.with_tensors({name: tensor[flat] for name, tensor in self.tensors.items()})
        return dequantize_dense(some).view(*indices.shape, self.shape[1])

    def check(self) -> None:
        """Check that this is a valid weight; use it for data that was read from a file.

        Raises:
            ArgumentError: if a shape, dtype or device is invalid, or a value or an entry of ``absmax`` is out of range.
        """
        self.check_tensors()
        few_bits.check_values(self.values, self.absmax, self.shape[1])

    def check_tensors(self) -> None:
        """Check shapes, dtypes and devices, which is all that kernels need.

        Raises:
            ArgumentError: if a shape, dtype or device is invalid.
        """
        few_bits.check_dtypes(self.values, self.absmax, self.group)
        rows, cols = self.shape
        widths = {"values": cols if self.bits == 8 else -(-cols // 2), "absmax": -(-cols // self.group)}
        for name, tensor in self.tensors.items():
            if tensor.shape != (rows, widths[name]) or not tensor.is_contiguous():
                raise ArgumentError(
                    f"{name} of a weight {self.shape} in {self.bits} bits must be contiguous {(rows, widths[name])}, "
                    f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
        if self.absmax.device != self.values.device:
            raise ArgumentError(
                f"values are on {self.values.device} and absmax on {self.absmax.device}: move one of them"
            )


def quantize_dense(weight: torch.Tensor, bits: int, group: int) -> PackedDense:
    """A weight [out, in] with each value rounded to the nearest one of ``bits`` bits.

    Args:
        weight: float32, float16 or bfloat16, on any device.
        bits: 8 or 4.
        group: number of inputs that share a scale, a multiple of 32.

    Raises:
        ArgumentError: if bits, group, or the weight's shape or dtype are not supported, or the weight holds NaN or
            infinity.
    """
    few_bits.check_bits(bits, group)
    if weight.dim() != 2 or weight.dtype not in few_bits.DTYPES:
        raise ArgumentError(
            "only float32, float16 and bfloat16 weights [out_features, in_features] can be quantized, got "
            f"{weight.dtype} {tuple(weight.shape)}"
        )
    rows, cols = weight.shape
    packed = PackedDense.empty((rows, cols), bits, group, dtype=weight.dtype, device=weight.device)
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, cols))
    for first in range(0, rows, at_once):
        part = weight.detach()[first : first + at_once]
        absmax = few_bits.largest_of_groups(part, group)
        if not bool(absmax.isfinite().all()):
            raise ArgumentError("a weight with NaN or infinity cannot be quantized: prune or load the model again")
        steps = few_bits.quantized_groups(part.float(), absmax.float(), group, bits)
        packed.values[first : first + at_once] = few_bits.stored(steps, bits)
        packed.absmax[first : first + at_once] = absmax
    return packed


def dequantize_dense(packed: PackedDense, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight [out, in].

    Args:
        packed: the quantized weight.
        dtype: dtype of the result; None for the weight's own.
    """
    steps = few_bits.integers(packed.values, packed.shape[1])
    weight = few_bits.dequantized_groups(steps, packed.absmax.float(), packed.group, packed.bits)
    return weight.to(dtype or packed.dtype)

"""packed_nm: a packed n:m weight, stored as its kept values and one bit per weight.

Layout 1 of this package, for n:m along the inputs of a weight [out, in], with m in 2, 4, 8, 16, 32:

    values [out, in * n / m], the weight's dtype: the kept weights of a row in the order of their inputs,
        exactly n of every group; a group with fewer non-zeros is filled up with some of its zeros
    meta   [out, ceil(in / 32)], int32: bit j % 32 of word j // 32 is set if weight (i, j) is kept;
        exactly n bits of every group are set, bits past the last input are 0

Both are row-major and contiguous. If in * n / m elements fill a multiple of 16 bytes, rows of values are 16-byte
aligned, which the fast kernels need. In a group with fewer than n non-zeros, negative zeros are kept before positive
ones, and among equal zeros the higher index. So packing the result of
:func:`~ace_triton.kernels.select_nm.select_nm` keeps the weights that it selected. NaN counts as non-zero.

Bytes per weight of e bytes: e * n / m + 1/8. For 2:4 and bf16 that is 0.5625 of the dense size.

Layout 2 has the same metadata, and values of 8 or 4 bits (:mod:`~ace_triton.kernels.few_bits`) in the same order:

    values of 8 bits [out, in * n / m], int8: the integers q
    values of 4 bits [out, ceil(in * n / m / 2)], uint8: q in 4 bits, in two's complement, two in a byte,
        the first one in the lower bits; a last half byte that no value needs is 0
    absmax [out, ceil(in / group)], float32, float16 or bfloat16: the largest magnitude among ``group`` inputs

Bytes per weight of b bits, if absmax has e bytes: b / 8 * n / m + 1/8 + e / group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import few_bits
from .errors import ArgumentError, PatternError
from .pattern import GROUP_SIZES, check_pattern

LAYOUT_VERSION = 1
"""Layout of weights that are not quantized."""

FEW_BITS_LAYOUT_VERSION = 2
"""Layout of quantized weights."""

WORD = 32
"""Weights per word of metadata."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class PackedNM:
    """A weight [out, in] packed in layout 1, or in layout 2 if it has ``absmax`` (see the module's docstring).

    Attributes:
        values: [out, in * n / m], float32, float16, bfloat16 or int8, contiguous. In layout 2 int8 (8 bits), or uint8
            [out, ceil(in * n / m / 2)] (4 bits).
        meta: [out, ceil(in / 32)], int32, contiguous, on the device of ``values``.
        n, m: n of every m inputs are kept.
        shape: (out, in) of the weight.
        absmax: [out, ceil(in / group)], contiguous, on the device of ``values``; None if the weight is not quantized.
        group: number of inputs that share an entry of ``absmax``; 0 without it.
    """

    values: torch.Tensor
    meta: torch.Tensor
    n: int
    m: int
    shape: tuple[int, int]
    absmax: torch.Tensor | None = None
    group: int = 0

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        n: int,
        m: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        bits: int | None = None,
        group: int = 0,
    ) -> PackedNM:
        """A packed weight with uninitialized tensors; ``dtype`` is that of the dense weight."""
        rows = shape[0]
        stored = dtype if bits is None else torch.int8 if bits == 8 else torch.uint8
        absmax = None if bits is None else torch.empty(rows, -(-shape[1] // group), dtype=dtype, device=device)
        values = torch.empty(rows, 0, dtype=stored, device=device)
        widths = cls(values, values, n, m, shape, absmax, group).widths
        values = torch.empty(rows, widths["values"], dtype=stored, device=device)
        meta = torch.empty(rows, widths["meta"], dtype=torch.int32, device=device)
        return cls(values, meta, n, m, shape, absmax, group)

    @property
    def bits(self) -> int | None:
        """Bits of a quantized value; None if the weight is not quantized."""
        return None if self.absmax is None else 8 if self.values.dtype == torch.int8 else 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight, and of the tokens that it multiplies."""
        return self.values.dtype if self.absmax is None else self.absmax.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        absmax = {} if self.absmax is None else {"absmax": self.absmax}
        return {"values": self.values, "meta": self.meta, **absmax}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> PackedNM:
        """A weight of the same kind with other :attr:`tensors`; it may have another number of rows."""
        shape = (len(tensors["values"]), self.shape[1])
        return PackedNM(tensors["values"], tensors["meta"], self.n, self.m, shape, tensors.get("absmax"), self.group)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight before it was packed."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> PackedNM:
        """The packed weight on ``device``."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def outputs(self, first: int, last: int) -> PackedNM:
        """The packed weight of outputs ``first`` to ``last`` (exclusive); it shares memory with this one."""
        parts = {name: tensor[first:last] for name, tensor in self.tensors.items()}
        return self.with_tensors(parts)

    def check(self) -> None:
        """Check that this is a valid weight; use it for data that was read from a file.

        Raises:
            ArgumentError: if the pattern, a shape, dtype or device is invalid; or if a quantized value or an entry of
                ``absmax`` is out of range.
            PatternError: if a group does not keep exactly n weights, or if a bit past the last input is set.
        """
        self.check_tensors()
        if self.absmax is None and self.values.dtype not in DTYPES:
            raise ArgumentError(f"values must be one of {DTYPES}, got {self.values.dtype}")
        check_meta(self.meta, self.n, self.m, self.shape)
        if self.absmax is not None:
            few_bits.check_values(self.values, self.absmax, self.kept_of_a_row)

    def check_tensors(self) -> None:
        """Check shapes, dtypes and devices of values and metadata, which is all that kernels need.

        The contents are not read, so this costs nothing. Kernels never access memory outside the tensors, whatever the
        contents are.

        Raises:
            ArgumentError: if the pattern, a shape, dtype or device is invalid.
        """
        self.check_pattern()
        if self.absmax is not None:
            few_bits.check_dtypes(self.values, self.absmax, self.group)
        for name, tensor in self.tensors.items():
            expected = (self.shape[0], self.widths[name])
            if tensor.shape != expected or not tensor.is_contiguous():
                raise ArgumentError(self._misfit(name, tensor, expected))
            if tensor.device != self.values.device:
                raise ArgumentError(
                    f"values are on {self.values.device} and {name} on {tensor.device}: move one of them"
                )
        check_meta_dtype(self.meta)

    @property
    def kept_of_a_row(self) -> int:
        """The number of kept weights in a row."""
        return self.shape[1] // self.m * self.n

    @property
    def widths(self) -> dict[str, int]:
        """The number of columns of each tensor, by name."""
        cols, kept = self.shape[1], self.kept_of_a_row
        widths = {"values": -(-kept // 2) if self.bits == 4 else kept, "meta": -(-cols // WORD)}
        return widths if self.absmax is None else {**widths, "absmax": -(-cols // self.group)}

    def check_pattern(self) -> None:
        """Raise ArgumentError if n:m is invalid or does not divide a weight of this shape."""
        if self.m not in GROUP_SIZES or not 0 < self.n < self.m or self.shape[1] % self.m:
            check_pattern(torch.empty(self.shape, dtype=torch.int8, device="meta"), self.n, self.m, "in")

    def _misfit(self, name: str, tensor: torch.Tensor, expected: tuple[int, int]) -> str:
        return (
            f"{name} of a {self.n}:{self.m} weight {self.shape} must be contiguous {expected}, "
            f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def check_meta_dtype(meta: torch.Tensor) -> None:
    """Raise ArgumentError if the metadata are not int32."""
    if meta.dtype != torch.int32:
        raise ArgumentError(
            f"meta must be torch.int32, got {meta.dtype}: it is made of bits, which a cast destroys; pack the weight "
            "again, or load it again and cast only what is a floating-point tensor"
        )


def check_meta(meta: torch.Tensor, n: int, m: int, shape: tuple[int, int]) -> None:
    """Raise PatternError if the metadata, int32 [out, ceil(in / 32)], does not keep exactly n of every m inputs."""
    rows, cols = shape
    if torch.equal(group_counts(meta, m), _sound_counts(n, m, cols).to(meta.device).expand_as(meta)):
        return
    bits = unpack_bits(meta)
    if bool(bits[:, cols:].any()):
        row = int(bits[:, cols:].any(1).int().argmax())
        raise PatternError(
            f"the metadata of row {row} marks inputs past the last one, {cols - 1}: the file is damaged, pack it again",
            row,
            cols // m,
            int(bits[row, cols:].sum()),
        )
    counts = bits[:, :cols].reshape(rows, cols // m, m).sum(-1)
    row, group = divmod(int((counts != n).flatten().int().argmax()), cols // m)
    raise PatternError(
        f"the metadata of row {row}, group {group} keeps {int(counts[row, group])} of {m} weights, "
        f"but {n}:{m} keeps exactly {n}: the file is damaged, pack it again",
        row,
        group,
        int(counts[row, group]),
    )


def _sound_counts(n: int, m: int, cols: int) -> torch.Tensor:
    """The result of :func:`group_counts` for a valid row: int32 [ceil(in / 32)]."""
    full = sum(n << place for place in range(0, WORD, m))
    words, rest = divmod(cols, WORD)
    last = [sum(n << place for place in range(0, rest, m))] if rest else []
    return torch.tensor([full] * words + last, dtype=torch.int64, device="cpu").to(torch.int32)


def group_counts(meta: torch.Tensor, m: int) -> torch.Tensor:
    """The number of set bits of every group, stored in the group's own m bits: int32, in the shape of ``meta``."""
    counts = meta - ((meta >> 1) & 0x55555555)
    for width, lanes in ((2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        if width < m:
            counts = (counts & lanes) + ((counts >> width) & lanes)
    return counts


def unpack_bits(meta: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [rows, words] to bool [rows, 32 * words], True if kept."""
    bits = meta[..., None] >> torch.arange(WORD, dtype=torch.int32, device=meta.device)
    return (bits & 1).bool().flatten(1)


def check_packable(weight: torch.Tensor, n: int, m: int) -> None:
    """Raise ArgumentError if layout 1 does not support the weight's shape, dtype or pattern."""
    if weight.dim() != 2:
        raise ArgumentError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ArgumentError(f"weight must be float32, float16, bfloat16 or int8, got {weight.dtype}")
    check_pattern(weight, n, m, "in")


def refuse_first(counts: torch.Tensor, n: int, m: int, cols: int) -> None:
    """Raise PatternError for the first group, row by row, whose count in ``counts`` [groups] exceeds n."""
    wrong = counts > n
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        refuse(first, int(counts[first]), n, m, cols)


def refuse(first: int, count: int, n: int, m: int, cols: int) -> None:
    """Raise PatternError for the group with index ``first``, counted row by row."""
    row, group = divmod(first, cols // m)
    raise PatternError(
        f"row {row}, group {group} (inputs {group * m} to {group * m + m - 1}) has {count} non-zeros, but {n}:{m} "
        f"keeps at most {n}: prune the weight to {n}:{m} first (select_nm, prune_linear), or pass the pattern it has",
        row,
        group,
        count,
    )

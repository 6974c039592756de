"""packed_rows: a packed weight whose zeros follow no pattern, stored as its non-zeros and one bit per weight.

For a weight [out, in] with any number of non-zeros in a row, float32, float16 or bfloat16:

    values [n_values], the weight's dtype: the non-zeros of all rows, row by row in the order of their inputs
    meta   [out, ceil(in / 32)], int32: bit j % 32 of word j // 32 is set if weight (i, j) is not zero;
        bits past the last input are 0
    starts [out + 1], int64: row i has the values from starts[i] to starts[i + 1]

``meta`` is as in layout 1 (:mod:`~ace_triton.kernels.packed_nm`). NaN counts as non-zero, and -0.0 as zero.

Bytes per weight of e bytes, with a share d of non-zeros: e * d + 1/8, and 8 bytes per row. For 50 % and bf16 that is
0.5625 of the dense size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ArgumentError, PatternError
from .packed_nm import WORD, check_meta_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

UNSTRUCTURED = "unstructured"
"""The pattern of these weights in tables and files, in place of n:m."""


@dataclass(frozen=True)
class PackedRows:
    """A packed weight [out, in] with row starts (see the module's docstring).

    Attributes:
        values: [n_values], float32, float16 or bfloat16, contiguous.
        meta: [out, ceil(in / 32)], int32, contiguous, on the device of ``values``.
        starts: [out + 1], int64, contiguous, on the same device.
        shape: (out, in) of the weight.
    """

    values: torch.Tensor
    meta: torch.Tensor
    starts: torch.Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight, and of the tokens that it multiplies."""
        return self.values.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {"values": self.values, "meta": self.meta, "starts": self.starts}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> PackedRows:
        """A weight with other :attr:`tensors`; it may have another number of rows."""
        return PackedRows(**tensors, shape=(len(tensors["meta"]), self.shape[1]))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight before it was packed."""
        return self.shape[0] * self.shape[1] * self.values.element_size()

    @property
    def packed_bytes(self) -> int:
        """Bytes of values, metadata and row starts."""
        return self.values.nbytes + self.meta.nbytes + self.starts.nbytes

    def to(self, device: torch.device | str) -> PackedRows:
        """The packed weight on ``device``."""
        return PackedRows(self.values.to(device), self.meta.to(device), self.starts.to(device), self.shape)

    def outputs(self, first: int, last: int) -> PackedRows:
        """The packed weight of outputs ``first`` to ``last`` (exclusive). It shares memory with this one: ``values``
        are still those of all rows."""
        meta, starts = self.meta[first:last], self.starts[first : last + 1]
        return PackedRows(self.values, meta, starts, (len(meta), self.shape[1]))

    def check(self) -> None:
        """Check that this is a valid packed weight; use it for data that was read from a file.

        Raises:
            ArgumentError: if a shape, dtype or device is invalid.
            PatternError: if row starts and metadata disagree, or if a bit past the last input is set.
        """
        self.check_tensors()
        if self.values.dtype not in DTYPES:
            raise ArgumentError(f"values must be float32, float16 or bfloat16, got {self.values.dtype}")
        check_starts(self.starts, len(self.values))
        check_counts(self.meta, self.starts, self.shape)

    def check_tensors(self) -> None:
        """Check shapes, dtypes and devices, which is all that kernels need.

        The contents are not read, so this costs nothing. Kernels never access memory outside the tensors, whatever the
        contents are.

        Raises:
            ArgumentError: if a shape, dtype or device is invalid.
        """
        rows, cols = self.shape
        if self.values.dim() != 1 or not self.values.is_contiguous():
            raise ArgumentError(self._misfit("values", self.values, "[n_values]"))
        for name, tensor, shape in (
            ("meta", self.meta, (rows, -(-cols // WORD))),
            ("starts", self.starts, (rows + 1,)),
        ):
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ArgumentError(self._misfit(name, tensor, str(shape)))
        check_meta_dtype(self.meta)
        if self.starts.dtype != torch.int64:
            raise ArgumentError(f"starts must be torch.int64, got {self.starts.dtype}: pack the weight again")
        if not self.values.device == self.meta.device == self.starts.device:
            raise ArgumentError(
                f"values are on {self.values.device}, meta on {self.meta.device} and starts on {self.starts.device}: "
                "move them to one device"
            )

    def _misfit(self, name: str, tensor: torch.Tensor, expected: str) -> str:
        return (
            f"{name} of a weight {self.shape} with row starts must be contiguous {expected}, "
            f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def check_starts(starts: torch.Tensor, n_values: int) -> None:
    """Raise PatternError unless row starts [out + 1] go from 0 to ``n_values`` and never back."""
    ends = [int(starts[0]), int(starts[-1])]
    if ends != [0, n_values]:
        raise PatternError(
            f"the row starts go from {ends[0]} to {ends[1]}, but there are {n_values} values: the file is damaged, "
            "pack it again"
        )
    back = starts[1:] < starts[:-1]
    if bool(back.any()):
        row = int(back.int().argmax())
        raise PatternError(
            f"row {row} starts at value {int(starts[row])} and ends at {int(starts[row + 1])}: the file is damaged, "
            "pack it again",
            row,
        )


def check_counts(meta: torch.Tensor, starts: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raise PatternError unless each row of the metadata has as many bits as the row starts say, none past the end."""
    rows, cols = shape
    counts = count_bits(meta).sum(1)
    wrong = counts != starts[1:] - starts[:-1]
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        n_values = int(starts[row + 1] - starts[row])
        raise PatternError(
            f"the metadata of row {row} keep {int(counts[row])} weights, but it has {n_values} values: the file is "
            "damaged, pack it again",
            row,
        )
    if rows and cols % WORD and bool((past := meta[:, -1] >> cols % WORD != 0).any()):
        row = int(past.int().argmax())
        raise PatternError(
            f"the metadata of row {row} marks inputs past the last one, {cols - 1}: the file is damaged, pack it again",
            row,
        )


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """The number of set bits of every int32 word, as int64."""
    counts = words.long() & 0xFFFFFFFF
    for width, lanes in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        counts = (counts & lanes) + (counts >> width & lanes)
    return counts

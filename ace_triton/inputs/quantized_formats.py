"""Formats of quantized weights: the tensors that a layer is stored in, and the weight that they stand for.

Every weight here is ``(q - z) * s`` with integers q, zero points z and scales s. It is computed in fp32, which holds
the product of two such numbers exactly unless the scales are fp32 too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import CheckpointError
from .quantization_fields import SIZES, Fields

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ puts output i of each eight outputs into the 4 bits at the place of i in this order."""

PACKED_BITS = (2, 4, 8)
"""Bits per weight of the packed formats. With 3 bits a weight may lie in two words, in a way that differs by writer."""

WORD = 32
"""Bits in a word of a packed tensor."""

Parts = Mapping[str, torch.Tensor]


class Format(Protocol):
    """How the weights of a checkpoint are stored.

    Ends of names follow a dot: "qweight" stands for ``layer.qweight``. If :attr:`weight_name` is "", they follow the
    name of a parameter: "_blocks" stands for ``experts.down_proj_blocks``.
    """

    @property
    def marks(self) -> Collection[str]:
        """Ends of the names of tensors that only a quantized layer has: ``layer.qweight`` for "qweight"."""

    @property
    def parts(self) -> Collection[str]:
        """Ends of the names of all tensors that belong to a quantized layer's weight."""

    @property
    def ignored(self) -> Collection[str]:
        """Ends of the names of tensors that have no meaning for a dense model: scales of quantized activations."""

    @property
    def weight_name(self) -> str:
        """The name of the dense weight, in place of these ends: "weight", or "" if they follow a parameter's name."""

    def weight(self, parts: Parts) -> torch.Tensor:
        """The weight of a layer, fp32 [out_features, in_features]; a parameter in the form of the model.

        Args:
            parts: the tensors of the layer by the end of their name.

        Raises:
            CheckpointError: if the tensors do not fit each other; the message is a clause without the layer's name.
        """


@dataclass(frozen=True)
class Gptq:
    """GPTQ: integers packed along the inputs.

    ``qweight`` is int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales`` [groups, out] and
    ``g_idx`` int32 [in], the group of each input. The lowest bits of a word come first.

    Attributes:
        bits: bits per weight, for a layer without ``g_idx``.
        group_size: inputs in a group, for a layer without ``g_idx``; -1 for one group.
        zeros_less_one: True if a stored zero point is one less than the real one (``checkpoint_format`` "gptq").
    """

    bits: int
    group_size: int
    zeros_less_one: bool
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    ignored = ()
    weight_name = "weight"

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        packed, zeros, scales = _packed(parts, "qweight"), _packed(parts, "qzeros"), _finite_matrix(parts, "scales")
        group_of = _group_index(parts, "g_idx")
        bits, count = self.bits, packed.shape[0] * WORD // self.bits
        if group_of is None:
            group_of = _groups(count, self.group_size)
        elif -(-group_of.numel() * bits // WORD) != packed.shape[0]:
            bits = packed.shape[0] * WORD // group_of.numel()  # A layer may differ from the configuration.
        integers = unpacked(packed.t(), bits)[:, : group_of.numel()]
        points = unpacked(zeros, bits)[:, : scales.shape[1]]
        if self.zeros_less_one:
            points = (points + 1) & (2**bits - 1)
        _check(points.shape == scales.shape, "qzeros and scales", zeros, scales)
        _check(integers.shape[0] == scales.shape[1], "qweight and scales", packed, scales)
        _check(group_of.numel() == integers.shape[1], "qweight and g_idx", packed, group_of)
        _check(int(group_of.min()) >= 0 and int(group_of.max()) < len(scales), "g_idx and scales", group_of, scales)
        return (integers - points.t()[:, group_of]).float() * scales.t()[:, group_of]


@dataclass(frozen=True)
class Awq:
    """AWQ of version "gemm": 4 bits, packed along the outputs in the order of :data:`AWQ_ORDER`.

    ``qweight`` is int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out].

    Attributes:
        group_size: inputs in a group; -1 for one group.
    """

    group_size: int
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales")
    ignored = ()
    weight_name = "weight"

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        packed, zeros, scales = _packed(parts, "qweight"), _packed(parts, "qzeros"), _finite_matrix(parts, "scales")
        integers, points = (self._in_order(unpacked(tensor, 4)) for tensor in (packed, zeros))
        _check(points.shape == scales.shape, "qzeros and scales", zeros, scales)
        _check(integers.shape[1] == scales.shape[1], "qweight and scales", packed, scales)
        index = _groups(integers.shape[0], self.group_size)
        _check(int(index[-1]) == len(scales) - 1, "qweight and scales", packed, scales)
        return ((integers - points[index]).float() * scales[index]).t().contiguous()

    @staticmethod
    def _in_order(integers: torch.Tensor) -> torch.Tensor:
        places = torch.tensor(AWQ_ORDER, dtype=torch.int64, device="cpu").argsort()
        return integers.unflatten(1, (-1, len(AWQ_ORDER)))[:, :, places].flatten(1)


@dataclass(frozen=True)
class CompressedTensors:
    """The formats of compressed-tensors with one scale per row, group of inputs, block or tensor.

    ``weight_packed`` is int32 [out, in * bits / 32] with integers to which 2^(bits - 1) was added; or ``weight`` is
    int8 or fp8 [out, in]. ``weight_scale`` is [out, groups], or with fewer rows for blocks. ``weight_zero_point`` is
    packed along the outputs if the weight is packed. ``weight_g_idx`` is the group of each input.

    Attributes:
        bits: bits per weight of the configuration's groups of layers.
        group_sizes: inputs in a group, of the configuration's groups of layers that have groups or blocks.
        block_rows: outputs in a block, of the configuration's groups of layers that have blocks.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    block_rows: tuple[int, ...]
    marks = ("weight_packed", "weight_scale")
    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    ignored = ("input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale")
    weight_name = "weight"

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        scale, points = _finite(parts, "weight_scale"), parts.get("weight_zero_point")
        scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
        if "weight_packed" not in parts:
            integers = _finite_matrix(parts, "weight")
        else:
            packed, shape = _packed(parts, "weight_packed"), _needed(parts, "weight_shape")
            _check(
                shape.numel() == 2 and not shape.is_floating_point(), "weight_packed and weight_shape", packed, shape
            )
            rows, columns = map(int, shape.flatten())
            bits = next((bits for bits in self.bits if -(-columns * bits // WORD) == packed.shape[1]), 0)
            if bits == 0 or rows != len(packed):
                raise CheckpointError(
                    f"weight_packed and weight_shape do not fit each other: {tuple(packed.shape)} of {WORD} bits and "
                    f"({rows}, {columns}) of {' or '.join(map(str, self.bits)) or 'unknown'} bits"
                )
            integers = (unpacked(packed, bits)[:, :columns] - 2 ** (bits - 1)).float()
            if points is not None:
                points = _packed(parts, "weight_zero_point").t()
                points = unpacked(points, bits).t()[: len(scale)] - 2 ** (bits - 1)
        group_of = _group_index(parts, "weight_g_idx")
        if points is not None:
            _check(points.numel() == scale.numel(), "weight_zero_point and weight_scale", points, scale)
            integers = integers - self._spread(points.float().reshape(scale.shape), integers, group_of)
        return integers * self._spread(scale, integers, group_of)

    def _spread(self, values: torch.Tensor, like: torch.Tensor, group_of: torch.Tensor | None) -> torch.Tensor:
        """One value for each weight, or in a shape that broadcasts to that."""
        (rows, columns), (all_rows, all_columns) = values.shape, like.shape
        if rows not in (1, all_rows):
            size = next((size for size in self.block_rows if -(-all_rows // size) == rows), 0)
            _check(size > 0, "weight and weight_scale", like, values)
            values = values.repeat_interleave(size, 0)[:all_rows]
        if columns == 1:
            return values
        if group_of is not None and int(group_of[0]) >= 0:  # -1 stands for groups in order.
            _check(len(group_of) == all_columns, "weight and weight_g_idx", like, group_of)
            fits = int(group_of.min()) >= 0 and int(group_of.max()) < columns
            _check(fits, "weight_g_idx and weight_scale", group_of, values)
            return values[:, group_of]
        size = next((size for size in self.group_sizes if -(-all_columns // size) == columns), 0)
        _check(size > 0, "weight and weight_scale", like, values)
        return values.repeat_interleave(size, 1)[:, :all_columns]


@dataclass(frozen=True)
class Bitsandbytes:
    """bitsandbytes: int8 rows, or 4-bit codes of a table in blocks.

    int8: ``weight`` int8 [out, in] and ``SCB`` fp32 [out], the largest absolute value of each row.

    4 bits: ``weight`` has two codes in a byte, the upper bits first. ``weight.quant_map`` is the table,
    ``weight.absmax`` has one factor per block, and ``weight.quant_state.bitsandbytes__nf4`` (or fp4) is JSON as bytes.
    With nested factors, ``absmax`` is codes of ``weight.nested_quant_map`` with the factors ``weight.nested_absmax``.
    """

    _STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
    marks = ("SCB", *_STATES)
    parts = (
        *("weight", "SCB", "weight_format", *_STATES, "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map"),
    )
    ignored = ()
    weight_name = "weight"

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        stored = _needed(parts, "weight")
        if "SCB" in parts:
            rows = _finite(parts, "SCB")
            _check(stored.dim() == 2 and rows.numel() == len(stored), "weight and SCB", stored, rows)
            return stored.float() * rows.reshape(-1, 1) * (1 / 127)
        state = self._state(parts)
        shape, size = torch.Size(state.sizes("shape", 2)), state.integer("blocksize", SIZES)
        if "nested_blocksize" in state.stated:
            codes, outer = _needed(parts, "weight.absmax"), _finite(parts, "weight.nested_absmax")
            factors = _looked_up(parts, "weight.nested_quant_map", 256, codes)
            factors = _blocks(factors, outer, state.integer("nested_blocksize", SIZES))
            factors = factors + state.number("nested_offset")
        else:
            factors = _finite(parts, "weight.absmax")
        stored = stored.flatten().view(torch.uint8)
        codes = torch.stack([stored >> 4, stored & 15], dim=1).flatten()
        if codes.numel() < shape.numel():
            raise CheckpointError(f"weight has {codes.numel():,} codes, and the shape {tuple(shape)} needs more")
        values = _looked_up(parts, "weight.quant_map", 16, codes[: shape.numel()])
        return _blocks(values, factors, size).reshape(shape)

    def _state(self, parts: Parts) -> Fields:
        name = next((name for name in self._STATES if name in parts), self._STATES[0])
        encoded = _needed(parts, name)
        try:
            state = json.loads(bytes(encoded.tolist()))
        except (ValueError, TypeError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise CheckpointError(f"{name} is no JSON object")
        return Fields(name, state)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned integers in the rows of a packed int32 matrix, int32; the lowest bits of a word come first."""
    if bits not in PACKED_BITS:
        raise CheckpointError(f"it has {bits} bits per weight; {', '.join(map(str, PACKED_BITS))} can be read")
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _looked_up(parts: Parts, name: str, size: int, codes: torch.Tensor) -> torch.Tensor:
    """The values of codes in a table of ``size`` values."""
    table = _finite(parts, name)
    if table.shape != (size,):
        raise CheckpointError(f"{name} is {_described(table)} instead of {size} values")
    if codes.dtype != torch.uint8:
        raise CheckpointError(f"the codes of {name} are {_described(codes)} instead of uint8")
    return table[codes.long()]


def _blocks(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """Values in consecutive blocks, each times the factor of its block."""
    _check(factors.numel() == -(-values.numel() // size), f"absmax and the blocks of {size}", factors, values)
    return values * factors.flatten().repeat_interleave(size)[: values.numel()]


def _groups(count: int, size: int) -> torch.Tensor:
    """The group of each input, int64 [count]."""
    index = torch.arange(count, dtype=torch.int64, device="cpu")
    return index // (size if size > 0 else max(count, 1))


def _needed(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise CheckpointError(f"it lacks {name}")
    return parts[name]


def _finite(parts: Parts, name: str) -> torch.Tensor:
    """A tensor in fp32 without NaN or infinite values."""
    tensor = _needed(parts, name)
    values = tensor.float()
    if tensor.is_floating_point() and not values.isfinite().all():
        raise CheckpointError(f"{name} has NaN or infinite values")
    return values


def _finite_matrix(parts: Parts, name: str) -> torch.Tensor:
    tensor = _needed(parts, name)
    if tensor.dim() != 2 or not tensor.numel():
        raise CheckpointError(f"{name} is {_described(tensor)} instead of a matrix")
    return _finite(parts, name)


def _packed(parts: Parts, name: str) -> torch.Tensor:
    tensor = _needed(parts, name)
    if tensor.dtype != torch.int32 or tensor.dim() != 2 or not tensor.numel():
        raise CheckpointError(f"{name} is {_described(tensor)} instead of an int32 matrix")
    return tensor


def _group_index(parts: Parts, name: str) -> torch.Tensor | None:
    """The stored group of each input, int64; None if it is missing or empty."""
    tensor = parts.get(name)
    if tensor is None or not tensor.numel():
        return None
    if tensor.dim() != 1 or tensor.is_floating_point():
        raise CheckpointError(f"{name} is {_described(tensor)} instead of a list of integers")
    return tensor.long()


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check(fits: bool, names: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if not fits:
        raise CheckpointError(f"{names} do not fit each other: {tuple(one.shape)} and {tuple(other.shape)}")

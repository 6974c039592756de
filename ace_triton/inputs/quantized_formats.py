"""Formats of quantized weights: the tensors that a layer is stored in, and the weight that they stand for.

Every weight is ``(q - z) * s`` with integers q, zero points z and scales s. It is computed in fp32, which holds the
product of two such numbers exactly unless the scales are fp32 too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import CheckpointError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ puts output i of each eight outputs into the 4 bits at the place of i in this order."""

PACKED_BITS = (2, 4, 8)
"""Bits per weight of the packed formats. With 3 bits a weight may lie in two words, in a way that differs by writer."""

WORD = 32
"""Bits in a word of a packed tensor."""

Parts = Mapping[str, torch.Tensor]


class Format(Protocol):
    """How the weights of a checkpoint are stored."""

    @property
    def marks(self) -> Collection[str]:
        """Ends of the names of tensors that only a quantized layer has: ``layer.qweight`` for "qweight"."""

    @property
    def parts(self) -> Collection[str]:
        """Ends of the names of all tensors that belong to a quantized layer's weight."""

    @property
    def ignored(self) -> Collection[str]:
        """Ends of the names of tensors that have no meaning for a dense model: scales of quantized activations."""

    def weight(self, parts: Parts) -> torch.Tensor:
        """The weight of a layer, fp32 [out_features, in_features].

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

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        packed, scales, zeros = (_needed(parts, name) for name in ("qweight", "scales", "qzeros"))
        group_of = parts.get("g_idx")
        bits, count = self.bits, packed.shape[0] * WORD // self.bits
        if group_of is None or not group_of.numel():
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
        index = group_of.long()
        return (integers - points.t()[:, index]).float() * scales.float().t()[:, index]


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

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        packed, scales, zeros = (_needed(parts, name) for name in ("qweight", "scales", "qzeros"))
        integers, points = (self._in_order(unpacked(tensor, 4)) for tensor in (packed, zeros))
        _check(points.shape == scales.shape, "qzeros and scales", zeros, scales)
        _check(integers.shape[1] == scales.shape[1], "qweight and scales", packed, scales)
        index = _groups(integers.shape[0], self.group_size)
        _check(int(index[-1]) == len(scales) - 1, "qweight and scales", packed, scales)
        return ((integers - points[index]).float() * scales.float()[index]).t().contiguous()

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

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        scale, points = _needed(parts, "weight_scale").float(), parts.get("weight_zero_point")
        packed = parts.get("weight_packed")
        if packed is None:
            integers = _needed(parts, "weight").float()
        else:
            rows, columns = (int(size) for size in _needed(parts, "weight_shape"))
            bits = next((bits for bits in self.bits if -(-columns * bits // WORD) == packed.shape[1]), 0)
            _check(bits > 0 and rows == len(packed), "weight_packed and weight_shape", packed, parts["weight_shape"])
            integers = (unpacked(packed, bits)[:, :columns] - 2 ** (bits - 1)).float()
            if points is not None:
                points = unpacked(points.t(), bits).t()[: len(scale)] - 2 ** (bits - 1)
        scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
        group_of = parts.get("weight_g_idx")
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
        if group_of is not None and group_of.numel() and int(group_of[0]) >= 0:
            return values[:, group_of.long()]
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

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`Format`."""
        stored, rows = _needed(parts, "weight"), parts.get("SCB")
        if rows is not None:
            _check(stored.dim() == 2 and rows.numel() == len(stored), "weight and SCB", stored, rows)
            return stored.float() * rows.float().reshape(-1, 1) * (1 / 127)
        encoded = next(parts[name] for name in self._STATES if name in parts)
        state = json.loads(bytes(encoded.tolist()))
        factors = _needed(parts, "weight.absmax")
        if "nested_blocksize" in state:
            table, outer = (_needed(parts, f"weight.nested_{name}") for name in ("quant_map", "absmax"))
            factors = _blocks(table.float()[factors.long()], outer.float(), int(state["nested_blocksize"]))
            factors = factors + float(state["nested_offset"])
        stored = stored.flatten().view(torch.uint8)
        codes = torch.stack([stored >> 4, stored & 15], dim=1).flatten()
        shape = torch.Size(state["shape"])
        _check(codes.numel() >= shape.numel(), "weight and its shape", stored, encoded)
        values = _needed(parts, "weight.quant_map").float()[codes[: shape.numel()].long()]
        return _blocks(values, factors.float(), int(state["blocksize"])).reshape(shape)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned integers in the last dimension of a packed tensor, int32; the lowest bits of a word come first."""
    if bits not in PACKED_BITS:
        raise CheckpointError(f"it has {bits} bits per weight; {', '.join(map(str, PACKED_BITS))} can be read")
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise CheckpointError(f"packed integers are {packed.dtype} {tuple(packed.shape)} instead of an int32 matrix")
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _blocks(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """Values in consecutive blocks, each times the factor of its block."""
    _check(factors.numel() == -(-values.numel() // size), "weight and absmax", values, factors)
    return values * factors.repeat_interleave(size)[: values.numel()]


def _groups(count: int, size: int) -> torch.Tensor:
    """The group of each input, int64 [count]."""
    index = torch.arange(count, dtype=torch.int64, device="cpu")
    return index // (size if size > 0 else max(count, 1))


def _needed(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise CheckpointError(f"it lacks {name}")
    return parts[name]


def _check(fits: bool, names: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if not fits:
        raise CheckpointError(f"{names} do not fit each other: {tuple(one.shape)} and {tuple(other.shape)}")


def format_of(stated: Mapping[str, Any]) -> Format | None:
    """The format of a configuration's ``quantization_config``; None if its method is not one of these.

    Raises:
        CheckpointError: if the method is known, but not this variant; the message is a clause.
    """
    method = stated.get("quant_method")
    if method == "gptq":
        return _gptq(stated)
    if method == "awq":
        return _awq(stated)
    if method == "compressed-tensors":
        return _compressed_tensors(stated)
    return Bitsandbytes() if method == "bitsandbytes" else None


def _gptq(stated: Mapping[str, Any]) -> Format:
    layout = "marlin" if stated.get("is_marlin_format") else stated.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"the layout {layout} of GPTQ is unknown here; gptq and gptq_v2 can be read")
    return Gptq(_bits(stated), _int(stated, "group_size", -1), layout == "gptq")


def _awq(stated: Mapping[str, Any]) -> Format:
    version = str(stated.get("version") or stated.get("format") or "gemm").lower()
    if version not in ("gemm", "exllama", "ipex") or stated.get("backend") == "llm-awq":
        raise CheckpointError(f"the version {version} of AWQ is unknown here; gemm can be read")
    if _bits(stated) != 4:
        raise CheckpointError(f"AWQ of {_bits(stated)} bits is unknown here; 4 bits can be read")
    return Awq(_int(stated, "group_size", _int(stated, "q_group_size", 128)))


def _compressed_tensors(stated: Mapping[str, Any]) -> Format:
    layouts = {str(stated.get("format") or "")}
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    layouts |= {str(group["format"]) for group in groups if group.get("format")}
    strange = layouts - {"", "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
    strange -= {"mixed-precision"}
    if strange or (stated.get("sparsity_config") or {}).get("format", "dense") != "dense":
        what = ", ".join(sorted(strange)) or "sparse"
        raise CheckpointError(
            f"the format {what} of compressed-tensors is unknown here; pack-quantized, int-quantized and "
            "float-quantized can be read"
        )
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]
    blocks = [entry["block_structure"] for entry in weights if entry.get("block_structure")]
    sizes = [entry["group_size"] for entry in weights if entry.get("group_size")] + [block[1] for block in blocks]
    return CompressedTensors(
        tuple(dict.fromkeys(int(entry.get("num_bits", 8)) for entry in weights)),
        tuple(dict.fromkeys(int(size) for size in sizes if size > 0)),
        tuple(dict.fromkeys(int(block[0]) for block in blocks)),
    )


def _bits(stated: Mapping[str, Any]) -> int:
    return _int(stated, "bits", _int(stated, "w_bit", 4))


def _int(stated: Mapping[str, Any], name: str, default: int) -> int:
    value = stated.get(name, default)
    if not isinstance(value, int):
        raise CheckpointError(f"its quantization_config has {name} {value!r} instead of a number")
    return value

"""VectorGroup: the column scales and variance factors of many layers, in one launch for all scales and two for all
factors.

Inside the ``with`` block, :func:`grouped_column_scale` and :func:`grouped_variance_factor` return vectors that the end
of the block writes. The results are those of the layers' own launches, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch

from . import launch
from .backend import choose_backend
from .column_scale import CheckedScale, ColumnScale, checked_column_scale, column_scale_work, rules, scale_at
from .finite import new_flag, note_not_finite
from .layer_table import (
    LayerTable,
    batches,
    bits_of,
    fp32_field,
    int_field,
    is_aligned,
    layer_of_program,
    pointer_field,
    slices,
)
from .op import Op, Work, launch_metadata
from .triton_import import tl, triton
from .variance_factor import (
    SMALLEST_NORMAL,
    VarianceNorm,
    average_inverses,
    check_squares,
    find_level,
    variance_factor,
    variance_factor_reference,
    variance_factor_work,
)


class _Factor(NamedTuple):
    """Arguments of a variance factor, and its result."""

    square: torch.Tensor
    norm: VarianceNorm
    power: float
    eps: float
    factor: torch.Tensor

    @classmethod
    def of(cls, square: torch.Tensor, norm: VarianceNorm, power: float, eps: float) -> _Factor:
        """With an uninitialized result."""
        factor = torch.empty(square.shape[1], dtype=torch.float32, device=square.device)
        return cls(square.contiguous(), norm, power, eps, factor)


class _Scale(NamedTuple):
    """Inputs of a column scale, and its result."""

    inputs: ColumnScale
    made: CheckedScale

    @classmethod
    def of(cls, inputs: ColumnScale) -> _Scale:
        """With an uninitialized result, and a flag that is 0."""
        device = next(iter(inputs.vectors().values())).device
        scale = torch.empty(inputs.in_features, dtype=torch.float32, device=device)
        return cls(inputs, CheckedScale(scale, new_flag(device)))


class _Open(threading.local):
    """The group that this thread is in, if any."""

    group: VectorGroup | None = None


_open = _Open()


class VectorGroup:
    """Launches at its end what its ``with`` block has asked for; nothing may read these vectors before."""

    def __init__(self) -> None:
        self._factors: list[_Factor] = []
        self._scales: list[_Scale] = []

    def __enter__(self) -> Self:
        self._outer, _open.group = _open.group, self
        return self

    def __exit__(self, *_: object) -> None:
        _open.group = self._outer
        factors, scales = self._factors, self._scales
        self._factors, self._scales = [], []
        _write_factors(factors)
        _write_scales(scales)

    def factor(self, square: torch.Tensor, norm: VarianceNorm, power: float, eps: float) -> torch.Tensor:
        """A variance factor that the end of the block writes."""
        self._factors.append(_Factor.of(square, norm, power, eps))
        return self._factors[-1].factor

    def scale(self, of: ColumnScale) -> CheckedScale:
        """A column scale, and the flag of its check, that the end of the block writes."""
        self._scales.append(_Scale.of(of))
        return self._scales[-1].made


def column_scales(of: Sequence[ColumnScale]) -> list[CheckedScale]:
    """As :func:`~ace_triton.kernels.column_scale.checked_column_scale` of each, in one launch."""
    entries = [_Scale.of(inputs) for inputs in of]
    _write_scales(entries)
    return [entry.made for entry in entries]


def variance_factors(
    squares: Sequence[torch.Tensor], norm: VarianceNorm, power: float, eps: float
) -> list[torch.Tensor]:
    """As :func:`~ace_triton.kernels.variance_factor.variance_factor` of each, in two launches."""
    for square in squares:
        check_squares(square, norm, eps)
    entries = [_Factor.of(square, norm, power, eps) for square in squares]
    _write_factors(entries)
    return [entry.factor for entry in entries]


def _write_factors(entries: Sequence[_Factor]) -> None:
    if entries:
        VARIANCE_FACTORS.on(*(entry.square for entry in entries))(entries)


def _write_scales(entries: Sequence[_Scale]) -> None:
    if entries:
        COLUMN_SCALES.on(*(vector for entry in entries for vector in entry.inputs.vectors().values()))(entries)


def in_group() -> bool:
    """True inside the ``with`` block of a group, whose vectors are not written yet."""
    return _open.group is not None


def grouped_column_scale(of: ColumnScale) -> CheckedScale:
    """As :func:`~ace_triton.kernels.column_scale.checked_column_scale`; in a group on a GPU, its end writes it."""
    group = _open.group
    if group is None or choose_backend(*of.vectors().values()) != "triton":
        return checked_column_scale(of)
    return group.scale(of)


def grouped_variance_factor(
    sequence_square: torch.Tensor, norm: VarianceNorm, power: float, eps: float
) -> torch.Tensor:
    """As :func:`~ace_triton.kernels.variance_factor.variance_factor`; in a group on a GPU, its end writes it."""
    group = _open.group
    if group is None or choose_backend(sequence_square) != "triton":
        return variance_factor(sequence_square, norm, power, eps)
    check_squares(sequence_square, norm, eps)
    return group.factor(sequence_square, norm, power, eps)


def _factors_by_reference(entries: Sequence[_Factor]) -> None:
    for square, norm, power, eps, factor in entries:
        factor.copy_(variance_factor_reference(square, norm, power, eps))


def _scales_by_reference(entries: Sequence[_Scale]) -> None:
    for of, made in entries:
        scale, not_finite = checked_column_scale(of)
        made.scale.copy_(scale)
        made.not_finite.copy_(not_finite)


def _factors_by_triton(entries: Sequence[_Factor]) -> None:
    def aligned(entry: _Factor) -> bool:
        return is_aligned([entry.square], entry.square.shape[1])

    there = [entry for entry in entries if entry.square.shape[1]]
    for same in batches(there, lambda entry: (entry.norm, entry.power, entry.eps, aligned(entry))):
        _launch_factors(same, aligned(same[0]))


def _launch_factors(entries: Sequence[_Factor], aligned: bool) -> None:
    """Launch for factors with the same options."""
    square, norm, power, eps, _ = entries[0]
    tile, table = launch.variance_factor(square), LayerTable(launches=2)
    has_levels = norm != "channel"
    levels = slices([len(entry.square) * has_levels for entry in entries], square.device)
    for entry, own in zip(entries, levels, strict=True):
        sequences, channels = entry.square.shape
        programs = sequences * has_levels, triton.cdiv(channels, tile.block_cols)
        table.add(programs, entry.square, own, entry.factor, sequences, channels)
    on_device = table.on(square.device)
    if all(table.grid(0)):
        _find_levels_of_layers[table.grid(0)](
            on_device, LAYERS=table.size, ALIGNED=aligned, ADD=norm == "frobenius", BLOCK=tile.levels_block, num_warps=1
        )
    _average_inverses_of_layers[table.grid(1)](
        *(on_device, power, eps, SMALLEST_NORMAL / eps),
        LAYERS=table.size,
        ALIGNED=aligned,
        NORM=norm,
        IS_POWER=power != 1,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        num_warps=1,
    )


def _scales_by_triton(entries: Sequence[_Scale]) -> None:
    there = [entry for entry in entries if entry.inputs.in_features]
    for same in batches(there, lambda entry: (tuple(entry.inputs.vectors()), *rules(entry.inputs).values())):
        of, device = same[0].inputs, same[0].made.scale.device
        block, table = launch.column_scale(same[0].made.scale), LayerTable()
        for entry in same:
            square, inverse_divisor, base, factor = entry.inputs.parts()
            cols = entry.inputs.in_features
            fields = square, bits_of(inverse_divisor), base, factor, entry.made.scale, entry.made.not_finite, cols
            table.add((triton.cdiv(cols, block),), *fields)
        _scale_columns_of_layers[table.grid()](
            table.on(device),
            LAYERS=table.size,
            SQUARE=of.square is not None,
            BASE=of.base is not None,
            FACTOR=of.factor is not None,
            **rules(of),
            BLOCK=block,
            num_warps=1,
        )


def _factors_work(entries: Sequence[_Factor]) -> Work:
    each = [variance_factor_work(*entry[:4]) for entry in entries]
    return Work(sum(work.bytes for work in each), sum(work.flops for work in each))


def _scales_work(entries: Sequence[_Scale]) -> Work:
    each = [column_scale_work(entry.inputs) for entry in entries]
    return Work(sum(work.bytes for work in each), sum(work.flops for work in each))


VARIANCE_FACTORS = Op("variance_factors", _factors_work, _factors_by_reference, triton=_factors_by_triton)
COLUMN_SCALES = Op("column_scales", _scales_work, _scales_by_reference, triton=_scales_by_triton)


@triton.jit(launch_metadata=launch_metadata)
def _find_levels_of_layers(
    table_ptr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    layer, sequence = layer_of_program(table_ptr, 0, LAYERS)
    square_ptr = pointer_field(table_ptr, layer, tl.float32, 2, LAYERS, ALIGNED)
    levels_ptr = pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, True)
    find_level(sequence, square_ptr, levels_ptr, int_field(table_ptr, layer, 6, LAYERS, ALIGNED), ADD, BLOCK)


@triton.jit(launch_metadata=launch_metadata)
def _average_inverses_of_layers(
    table_ptr,
    power,
    eps,
    least,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    IS_POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    layer, program = layer_of_program(table_ptr, 1, LAYERS)
    square_ptr = pointer_field(table_ptr, layer, tl.float32, 2, LAYERS, ALIGNED)
    levels_ptr = pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, True)
    factor_ptr = pointer_field(table_ptr, layer, tl.float32, 4, LAYERS, True)
    sequences = int_field(table_ptr, layer, 5, LAYERS, False)
    channels = int_field(table_ptr, layer, 6, LAYERS, ALIGNED)
    average_inverses(
        *(program, square_ptr, levels_ptr, factor_ptr, sequences, channels, power, eps, least),
        *(NORM, IS_POWER, BLOCK_ROWS, BLOCK_COLS),
    )


@triton.jit(launch_metadata=launch_metadata)
def _scale_columns_of_layers(
    table_ptr,
    LAYERS: tl.constexpr,
    SQUARE: tl.constexpr,
    BASE: tl.constexpr,
    FACTOR: tl.constexpr,
    SIGN: tl.constexpr,
    QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer, program = layer_of_program(table_ptr, 0, LAYERS)
    square_ptr = pointer_field(table_ptr, layer, tl.float64, 1, LAYERS, False) if SQUARE else None
    inverse_divisor = fp32_field(table_ptr, layer, 2, LAYERS)
    base_ptr = pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, False) if BASE else None
    factor_ptr = pointer_field(table_ptr, layer, tl.float32, 4, LAYERS, False) if FACTOR else None
    scale_ptr = pointer_field(table_ptr, layer, tl.float32, 5, LAYERS, True)
    found_ptr = pointer_field(table_ptr, layer, tl.int32, 6, LAYERS, False)
    cols = int_field(table_ptr, layer, 7, LAYERS, False)
    j = program * BLOCK + tl.arange(0, BLOCK)
    scale = scale_at(square_ptr, inverse_divisor, base_ptr, factor_ptr, j, j < cols, SIGN, QUARTERS)
    tl.store(scale_ptr + j, scale, mask=j < cols)
    note_not_finite(scale, found_ptr, 1, False)

"""select_nm_group: keeps the n highest of every m in many weights, such as those of a block, in one launch.

The results are those of :func:`~ace_triton.kernels.select_nm.select_nm` for each weight. Bytes per weight of e bytes:
e read, e written. The vectors of the scores are read once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from . import cpu, launch
from .errors import ArgumentError
from .layer_table import (
    LayerTable,
    any_flag,
    batches,
    element_type,
    int_field,
    is_aligned,
    layer_of_program,
    pointer_field,
)
from .op import Op, Work, launch_metadata
from .pattern import Axis, check_pattern
from .score_terms import ScoreTerms
from .select_nm import (
    bytes_of_selection,
    check_selection,
    finished_output,
    flops_of_scores,
    select_nm_reference,
    select_tiles,
    with_unit_stride,
)
from .triton_import import tl, triton

MOST_FLAGS = 8


def select_nm_group(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    *,
    axis: Axis = "in",
    unless: Sequence[torch.Tensor] = (),
) -> None:
    """Set all but the n weights with the highest score in every group of m to +0.0, in place.

    Args:
        weights: one or more of [out_features, in_features], on one device; fp32, fp16 or bf16, each its own dtype.
        terms: the factors of each weight's score; no coupling.
        n: how many weights of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides the size of the grouped axis of each weight.
        axis: "in" or "out", as for :func:`~ace_triton.kernels.select_nm.select_nm`.
        unless: flags, int32 [1] each, on the weights' device. If one is not 0 when the kernel runs, all weights stay as
            they are.

    Raises:
        ArgumentError: if the pattern, a shape or a dtype is not supported, or if a score has a coupling, or, on the
            CPU, if a score term is negative or not finite. Nothing was changed.
    """
    if not weights or len(weights) != len(terms):
        raise ArgumentError(
            f"pass one or more weights, and as many terms; got {len(weights)} weights, {len(terms)} terms"
        )
    for weight, own in zip(weights, terms, strict=True):
        check_selection(weight, own, "weight")
        check_pattern(weight, n, m, axis)
        if own.coupling is not None:
            raise ArgumentError("select_nm_group takes no coupling: use select_nm for scores with a coupling matrix")
    vectors = [tensor for own in terms for tensor in own.tensors.values()]
    SELECT_NM_GROUP.on(*weights, *vectors, *unless, writes=weights)(weights, terms, n, m, axis, unless)


def select_nm_group_reference(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    axis: Axis = "in",
    unless: Sequence[torch.Tensor] = (),
) -> None:
    """The same selection in plain torch, one weight after another."""
    if any(bool(flag) for flag in unless):
        return
    for own in terms:
        own.check_range()
    for weight, own in zip(weights, terms, strict=True):
        select_nm_reference(weight, own, n, m, axis=axis)


def _by_cpu(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    axis: Axis,
    unless: Sequence[torch.Tensor],
) -> None:
    if any(bool(flag) for flag in unless):
        return
    for own in terms:
        own.check_range()
    for weight, own in zip(weights, terms, strict=True):
        cpu.select_nm(weight, own, n, m, axis, "weight")


def _by_triton(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    axis: Axis,
    unless: Sequence[torch.Tensor],
) -> None:
    flags = list({id(flag): flag for flag in unless}.values())
    if len(flags) > MOST_FLAGS:
        flags = [torch.cat(flags).abs().amax(0, keepdim=True)]
    sources = [with_unit_stride(weight) for weight in weights]

    def kind(place: int) -> Hashable:
        source, own = sources[place], terms[place]
        aligned = is_aligned([source, *own.tensors.values()], source.shape[1], source.stride(0))
        return source.dtype, aligned, tuple(own.tensors), own.power

    whole = [place for place, source in enumerate(sources) if source.numel()]
    for places in batches(whole, kind):
        _launch([sources[place] for place in places], [terms[place] for place in places], n, m, axis, flags)
    for weight, source in zip(weights, sources, strict=True):
        finished_output(weight, source, "weight")


def _launch(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    axis: Axis,
    flags: Sequence[torch.Tensor],
) -> None:
    """Launch for weights of one kind."""
    like, own = weights[0], terms[0]
    tile, table = launch.select_nm_group(weights, m, axis), LayerTable()
    for weight, factors in zip(weights, terms, strict=True):
        fields = weight, factors.row, factors.col, factors.scale, *weight.shape, weight.stride(0)
        table.add((tile.programs(weight, m, axis),), *fields)
    table.add_line(flags)
    _select_nm_of_layers[table.grid()](
        table.on(like.device),
        tile.trips,
        DTYPE=element_type(like.dtype),
        LAYERS=table.size,
        ALIGNED=is_aligned([like, *own.tensors.values()], like.shape[1], like.stride(0)),
        ROW=own.row is not None,
        COL=own.col is not None,
        SCALE=own.scale is not None,
        UNLESS=bool(flags),
        N=n,
        M=m,
        SPLIT=tile.split,
        AXIS=axis,
        POWER=own.power,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        num_warps=tile.num_warps,
    )


def _work(
    weights: Sequence[torch.Tensor],
    terms: Sequence[ScoreTerms],
    n: int,
    m: int,
    axis: Axis,
    unless: Sequence[torch.Tensor],
) -> Work:
    each = list(zip(weights, terms, strict=True))
    moved = sum(bytes_of_selection(weight, own, "weight") for weight, own in each)
    return Work(moved, sum(flops_of_scores(weight, own) for weight, own in each))


SELECT_NM_GROUP = Op("select_nm_group", _work, select_nm_group_reference, _by_cpu, _by_triton)


@triton.jit(do_not_specialize=["trips"], launch_metadata=launch_metadata)
def _select_nm_of_layers(
    table_ptr,
    trips,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    SCALE: tl.constexpr,
    UNLESS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    AXIS: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    layer, program = layer_of_program(table_ptr, 0, LAYERS)
    weight_ptr = pointer_field(table_ptr, layer, DTYPE, 1, LAYERS, ALIGNED)
    row_ptr = pointer_field(table_ptr, layer, tl.float32, 2, LAYERS, ALIGNED) if ROW else None
    col_ptr = pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, ALIGNED) if COL else None
    scale_ptr = pointer_field(table_ptr, layer, tl.float32, 4, LAYERS, ALIGNED) if SCALE else None
    rows = int_field(table_ptr, layer, 5, LAYERS, False)
    cols = int_field(table_ptr, layer, 6, LAYERS, ALIGNED)
    stride = int_field(table_ptr, layer, 7, LAYERS, ALIGNED)
    stored = tl.where(any_flag(table_ptr, 8, LAYERS) == 0, rows, 0) if UNLESS else rows
    # Passed one by one: a Triton tuple cannot hold a pointer that is None.
    select_tiles(
        program,
        weight_ptr,
        weight_ptr,
        row_ptr,
        col_ptr,
        scale_ptr,
        None,
        *(rows, cols, stride, stride, stored, trips),
        *(N, M, SPLIT, AXIS, "weight", POWER, BLOCK_ROWS, BLOCK_COLS),
    )

"""group_relative_importance: RIA's terms of many weights, such as those of a block, in two launches.

    1 / R_ki,  R_ki = sum_j |W_kij|      1 / C_kj,  C_kj = sum_i |W_kij|

The results are those of :func:`~ace_triton.kernels.weight_sums.relative_importance` for each weight, bit for bit. Bytes
per weight of e bytes: e read, and about 1 % more for the partial sums of large layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import cpu, launch_sums
from .errors import ArgumentError
from .finite import new_flag
from .finite_check import FiniteCheck
from .layer_table import (
    LayerTable,
    batches,
    element_type,
    int_field,
    is_aligned,
    layer_of_program,
    pointer_field,
    slices,
)
from .op import Op, Work, launch_metadata
from .score_terms import ScoreTerms
from .triton_import import tl, triton
from .weight_sums import (
    MERGED_PARTS,
    MERGED_SUMS,
    SMALLEST_NORMAL,
    check_matrix,
    checked_terms,
    keep_relative_importance,
    keep_terms,
    merge_parts,
    relative_importance_reference,
    sum_magnitudes,
)


def group_relative_importance(weights: Sequence[torch.Tensor]) -> list[ScoreTerms]:
    """The terms ``row`` and ``col`` of each weight's score, and the check of the weight.

    Args:
        weights: one or more of [out_features, in_features], on one device; fp32, fp16 or bf16, each its own dtype.

    Raises:
        ArgumentError: if there is no weight, or a shape or dtype does not fit.
    """
    if not weights:
        raise ArgumentError("no weights were given: pass at least one")
    for weight in weights:
        check_matrix(weight)
    return GROUP_RELATIVE_IMPORTANCE.on(*weights)(weights)


def keep_group_relative_importance(weights: Sequence[torch.Tensor], finite: FiniteCheck) -> None:
    """As :func:`~ace_triton.kernels.weight_sums.keep_relative_importance` of each weight, in two launches."""
    if len(weights) == 1:
        keep_relative_importance(weights[0], finite)
    elif weights:
        for weight, terms in zip(weights, group_relative_importance(weights), strict=True):
            keep_terms(weight, terms, finite)


def group_relative_importance_reference(weights: Sequence[torch.Tensor]) -> list[ScoreTerms]:
    """As :func:`group_relative_importance`, computed with plain torch, one weight after another."""
    return [relative_importance_reference(weight) for weight in weights]


def _by_cpu(weights: Sequence[torch.Tensor]) -> list[ScoreTerms]:
    found = []
    for weight in weights:
        row, col, _, flags = cpu.weight_sums(weight, True, None)
        found.append(checked_terms(weight, row, col, None, flags))
    return found


def _by_triton(weights: Sequence[torch.Tensor]) -> list[ScoreTerms]:
    sources = [weight.detach() if weight.stride(1) == 1 else weight.detach().contiguous() for weight in weights]

    def aligned(place: int) -> bool:
        return is_aligned([sources[place]], *sources[place].shape, sources[place].stride(0))

    found: dict[int, ScoreTerms] = {}
    for places in batches(range(len(weights)), lambda place: (sources[place].dtype, aligned(place))):
        sums = _launch([sources[place] for place in places], aligned(places[0]))
        for place, (row, col, flags) in zip(places, sums, strict=True):
            found[place] = checked_terms(weights[place], row, col, None, flags)
    return [found[place] for place in range(len(weights))]


def _launch(weights: Sequence[torch.Tensor], aligned: bool) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The inverse row and column sums of weights of one kind, and a flag for each that is non-zero if not finite."""
    device, like = weights[0].device, weights[0]
    tiles = [launch_sums.weight_sums(weight) for weight in weights]
    pieces = max(tile.pieces for tile in tiles)
    sizes: list[int] = []
    numbers: list[tuple[int, int]] = []
    for weight, tile in zip(weights, tiles, strict=True):
        rows, cols = weight.shape
        across = triton.cdiv(cols, tile.pieces * tile.block_cols)
        down = triton.cdiv(rows, tile.block_rows * tile.trips)
        numbers.append((across, down))
        sizes += [across * rows, down * cols]
    # The sums may be kept for long, so partial sums have memory of their own.
    parts = iter(slices(sizes, device))
    sums = iter(slices([size for weight in weights for size in weight.shape], device))
    table, results = LayerTable(launches=2), []
    for weight, tile, (across, down) in zip(weights, tiles, numbers, strict=True):
        rows, cols = weight.shape
        row_parts, col_parts, row_sums, col_sums = next(parts), next(parts), next(sums), next(sums)
        found = new_flag(device)
        merged = triton.cdiv(cols, MERGED_SUMS) + triton.cdiv(rows, MERGED_SUMS)
        table.add(
            (across * down, merged),
            *(weight, row_parts, col_parts, row_sums, col_sums, found),
            *(rows, cols, weight.stride(0), tile.trips, across, down),
        )
        results.append((row_sums, col_sums, found))
    on_device = table.on(device)
    if all(table.grid(0)):
        _sum_magnitudes_of_layers[table.grid(0)](
            on_device,
            DTYPE=element_type(like.dtype),
            LAYERS=table.size,
            ALIGNED=aligned,
            BLOCK_ROWS=tiles[0].block_rows,
            BLOCK_COLS=tiles[0].block_cols,
            PIECES=pieces,
            num_warps=tiles[0].num_warps,
        )
    if all(table.grid(1)):
        _merge_parts_of_layers[table.grid(1)](
            on_device,
            LAYERS=table.size,
            ALIGNED=aligned,
            SMALLEST=SMALLEST_NORMAL,
            BLOCK_PARTS=MERGED_PARTS,
            BLOCK_SUMS=MERGED_SUMS,
            num_warps=1,
        )
    return results


def _work(weights: Sequence[torch.Tensor]) -> Work:
    sums = sum(sum(weight.shape) for weight in weights)
    return Work(sum(weight.nbytes for weight in weights) + 4 * sums, 2 * sum(weight.numel() for weight in weights))


GROUP_RELATIVE_IMPORTANCE = Op(
    "group_relative_importance", _work, group_relative_importance_reference, _by_cpu, _by_triton
)


@triton.jit(launch_metadata=launch_metadata)
def _sum_magnitudes_of_layers(
    table_ptr,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
):
    layer, program = layer_of_program(table_ptr, 0, LAYERS)
    sum_magnitudes(
        program,
        pointer_field(table_ptr, layer, DTYPE, 2, LAYERS, ALIGNED),
        pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, True),
        pointer_field(table_ptr, layer, tl.float32, 4, LAYERS, True),
        int_field(table_ptr, layer, 8, LAYERS, ALIGNED),
        int_field(table_ptr, layer, 9, LAYERS, ALIGNED),
        int_field(table_ptr, layer, 10, LAYERS, ALIGNED),
        int_field(table_ptr, layer, 11, LAYERS, False),
        *(BLOCK_ROWS, BLOCK_COLS, PIECES),
    )


@triton.jit(launch_metadata=launch_metadata)
def _merge_parts_of_layers(
    table_ptr,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """The first programs of a layer merge column sums, the others row sums; all are inverted."""
    layer, program = layer_of_program(table_ptr, 1, LAYERS)
    found_ptr = pointer_field(table_ptr, layer, tl.int32, 7, LAYERS, False)
    rows = int_field(table_ptr, layer, 8, LAYERS, ALIGNED)
    cols = int_field(table_ptr, layer, 9, LAYERS, ALIGNED)
    col_blocks = tl.cdiv(cols, BLOCK_SUMS)
    if program < col_blocks:
        merge_parts(
            pointer_field(table_ptr, layer, tl.float32, 4, LAYERS, True),
            pointer_field(table_ptr, layer, tl.float32, 6, LAYERS, True),
            *(found_ptr, program, int_field(table_ptr, layer, 13, LAYERS, False), cols),
            *(True, SMALLEST, BLOCK_PARTS, BLOCK_SUMS),
        )
    else:
        merge_parts(
            pointer_field(table_ptr, layer, tl.float32, 3, LAYERS, True),
            pointer_field(table_ptr, layer, tl.float32, 5, LAYERS, True),
            *(found_ptr, program - col_blocks, int_field(table_ptr, layer, 12, LAYERS, False), rows),
            *(True, SMALLEST, BLOCK_PARTS, BLOCK_SUMS),
        )

"""find_each_not_finite: a flag for each of many weights, such as those of a block, in one launch.

A flag tells if the weight contains NaN or infinity. Bytes per weight of e bytes: e read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import launch
from .finite import check_block, find_not_finite_reference, new_flag
from .layer_table import (
    LayerTable,
    batches,
    element_type,
    is_aligned,
    layer_of_program,
    long_field,
    pointer_field,
)
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton


def find_each_not_finite(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each weight a flag that no host has read: int32 [1], 0 if the weight is finite.

    Args:
        weights: any shapes; fp32, fp16 or bf16; all on one device.
    """
    return FIND_EACH_NOT_FINITE.on(*weights)(weights) if weights else []


def find_each_not_finite_reference(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same flags in plain torch."""
    return [find_not_finite_reference([weight], [], None) for weight in weights]


def _by_triton(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    flags = [new_flag(weight.device) for weight in weights]
    sources = [weight.detach().contiguous() for weight in weights]

    def aligned(place: int) -> bool:
        return is_aligned([sources[place]], sources[place].numel())

    there = [place for place, source in enumerate(sources) if source.numel()]
    for places in batches(there, lambda place: (sources[place].dtype, aligned(place))):
        like, table = sources[places[0]], LayerTable()
        block = launch.all_finite(like)
        for place in places:
            size = sources[place].numel()
            table.add((triton.cdiv(size, block),), sources[place], flags[place], size)
        _find_non_finite_layers[table.grid()](
            table.on(like.device),
            DTYPE=element_type(like.dtype),
            LAYERS=table.size,
            ALIGNED=aligned(places[0]),
            BLOCK=block,
            num_warps=launch.WARPS,
        )
    return flags


def _work(weights: Sequence[torch.Tensor]) -> Work:
    return Work(bytes_of(*weights))


FIND_EACH_NOT_FINITE = Op("find_each_not_finite", _work, find_each_not_finite_reference, triton=_by_triton)


@triton.jit(launch_metadata=launch_metadata)
def _find_non_finite_layers(
    table_ptr, DTYPE: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    layer, program = layer_of_program(table_ptr, 0, LAYERS)
    weight_ptr = pointer_field(table_ptr, layer, DTYPE, 1, LAYERS, ALIGNED)
    found_ptr = pointer_field(table_ptr, layer, tl.int32, 2, LAYERS, False)
    check_block(weight_ptr, found_ptr, 1, program, long_field(table_ptr, layer, 3, LAYERS, ALIGNED), True, BLOCK)

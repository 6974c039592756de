"""Operations name themselves to profilers, with the bytes and flops of a call, and cost nothing without one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ace_triton import kernels
from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.assignment import assignment
from ace_triton.kernels.backend import HAS_TRITON, interpreting
from ace_triton.kernels.column_scale import ColumnScale, column_scale
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.expanded_linear import expanded_linear
from ace_triton.kernels.finite import all_finite, find_not_finite
from ace_triton.kernels.finite_group import find_each_not_finite
from ace_triton.kernels.gram_product import gram_product
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import fragments_of, nm_linear_mma
from ace_triton.kernels.op import Op, Work, launch_metadata
from ace_triton.kernels.pack_nm import pack_cutlass, pack_nm, pack_nm_reference, pack_scored
from ace_triton.kernels.pack_rows import pack_rows, pack_rows_reference, unpack_rows
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.token_statistics import no_moments, token_statistics
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.vector_group import column_scales, variance_factors
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weight_sums_group import group_relative_importance
from ace_triton.kernels.weighted_squares import weighted_squares

LABEL = re.compile(r"ace_triton::(\w+) bytes=(\d+) flops=(\d+)")


def recorded(call: Callable[[], object]) -> list[tuple[str, int, int]]:
    """Names, bytes and flops of the operations in ``call``, as torch.profiler shows them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    found = [LABEL.fullmatch(event.name) for event in profiler.events() if event.name.startswith("ace_triton")]
    return [(match[1], int(match[2]), int(match[3])) for match in found]


@pytest.fixture
def calls(device) -> dict[str, tuple[Callable[[], object], int, int]]:
    """A call of every operation, with its bytes and flops, counted by hand."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(dtype).to(device)

    half = torch.bfloat16
    weight, other = rand(32, 64, dtype=half), rand(32, 64, dtype=half)
    scale, relative = ScoreTerms(scale=rand(64)), ScoreTerms(rand(32), rand(64), rand(64), power=2)
    pruned = select_nm_reference(rand(32, 64, dtype=half), scale, 2, 4)
    packed = pack_nm_reference(pruned, 2, 4)
    tokens, outputs, token_weights = rand(10, 64, dtype=half), rand(10, 32, dtype=half), rand(10)
    square = ColumnScale(rand(64, dtype=torch.float64), factor=rand(64))
    values, rounded = rand(32, 64), rand(32, 64, dtype=half)
    kept, pools = GradientMoments.like(values), rand(2, 16, 8)
    of_packed = 32 * 32 * 2 + 32 * 2 * 4
    fragments, quantized = fragments_of(packed), quantize_dense(weight, 8, 32)
    by_rows, of_rows = pack_rows_reference(pruned), of_packed + 33 * 8
    return {
        "adamw": (
            lambda: adamw(values, kept, weight, Step(0.1, 1), factor=rand(1), rounded=rounded),
            *(2048 * (12 + 2 + 12 + 2) + 4, 14 * 2048),
        ),
        "all_finite": (lambda: all_finite(weight, terms=(scale.scale,)), 4096 + 256, 0),
        "assignment": (lambda: assignment(rand(2, 8, 8)), 2 * 64 * 4 + 2 * 8 * 8, 0),
        "column_scale": (lambda: column_scale(square), 64 * (8 + 4 + 4), 3 * 64),
        "column_scales": (lambda: column_scales([square, square]), 2 * 64 * (8 + 4 + 4), 2 * 3 * 64),
        "cosp_select": (
            lambda: cosp_select(other, scale, tokens, outputs, token_weights, 2, 4),
            *(2 * 4096 + 256 + 1280 + 640 + 40, 2 * 10 * 2048 + 2 * 2048),
        ),
        "coupling": (
            lambda: coupling(tokens, outputs, token_weights),
            *(1280 + 640 + 40 + 2 * 8192, 2 * 10 * 2048),
        ),
        "divergence": (lambda: divergence(weight, other), 3 * 4096 + 32 * 4, 14 * 2048),
        "expanded_linear": (
            lambda: expanded_linear(tokens, packed, rand(32)),
            *(1280 + of_packed + 640 + 128, 2 * 10 * 1024 + 320),
        ),
        "find_each_not_finite": (lambda: find_each_not_finite([weight, other]), 2 * 4096, 0),
        "find_not_finite": (lambda: find_not_finite(weight, terms=(scale.scale,)), 4096 + 256, 0),
        "gram_product": (lambda: gram_product(tokens), 1280 + 64 * 64 * 4, 10 * 64 * 65),
        "group_relative_importance": (
            lambda: group_relative_importance([weight, other]),
            *(2 * (4096 + 4 * (32 + 64)), 4 * 2048),
        ),
        "join_gains": (
            lambda: join_gains(pools, pools[..., :5]),
            *(4 * (2 * 16 * 8 + 2 * 16 * 5 + 2 * 5 * 8), 2 * 16 * 2 * 5 * 8),
        ),
        "moments": (lambda: moments(weight), 4096 + 64 * (4 + 16) + 8, 6 * 2048),
        "nm_linear": (
            lambda: nm_linear(tokens, packed, rand(32)),
            *(1280 + of_packed + 640 + 128, 2 * 10 * 1024 + 320),
        ),
        "nm_linear_mma": (
            lambda: nm_linear_mma(tokens, packed, fragments, rand(32)),
            *(1280 + of_packed + 640 + 128, 2 * 10 * 1024 + 320),
        ),
        "pack_cutlass": (lambda: pack_cutlass(weight, scale), 4096 + 256 + of_packed, 2048),
        "pack_nm": (lambda: pack_nm(pruned, 2, 4), 4096 + of_packed, 0),
        "pack_rows": (lambda: pack_rows(pruned), 4096 + of_rows, 0),
        "pack_scored": (lambda: pack_scored(weight, scale, 2, 4), 4096 + 256 + of_packed, 2048),
        "relative_importance": (
            lambda: relative_importance(weight, square),
            *(4096 + 4 * (32 + 64) + 64 * (8 + 4 + 4), 2 * 2048 + 3 * 64),
        ),
        "quantized_linear": (
            lambda: quantized_linear(tokens, quantized, rand(32)),
            *(10 * 64 * 2 + 32 * 64 + 32 * 2 * 2 + 32 * 4 + 10 * 32 * 2, 2 * 10 * 32 * 64 + 10 * 32),
        ),
        "round_groups": (
            lambda: round_groups(values, 8, 32, half, rounded),
            *(2048 * (4 + 2), 4 * 2048),
        ),
        "rows_linear": (
            lambda: rows_linear(tokens, by_rows, rand(32)),
            *(1280 + of_rows + 640 + 128, 2 * 10 * 1024 + 320),
        ),
        "select_nm": (lambda: select_nm(weight, relative, 2, 4), 2 * 4096 + 4 * (32 + 64 + 64), 4 * 2048),
        "select_nm_group": (
            lambda: select_nm_group([weight, other], [relative, scale], 2, 4),
            *(4 * 4096 + 4 * (32 + 64 + 64) + 256, (4 + 1) * 2048),
        ),
        "select_rows": (
            lambda: select_rows(weight, scale, 20, output="bits"),
            *(4096 + 256 + 32 * 8, 2048),
        ),
        "token_norms": (lambda: token_norms(outputs), 640 + 40, 2 * 320),
        "token_statistics": (
            lambda: token_statistics(tokens, None, no_moments(64, device)),
            *(1280 + 2 * (8 + 2 * 512) + 256 + 8, 6 * 640),
        ),
        "unpack_nm": (lambda: unpack_nm(packed), of_packed + 4096, 0),
        "unpack_rows": (lambda: unpack_rows(by_rows), of_rows + 4096, 0),
        "variance_factor": (
            lambda: variance_factor(pools[0], "frobenius", 0.5, 0.01),
            *(4 * (128 + 8), 5 * 128),
        ),
        "variance_factors": (
            lambda: variance_factors([pools[0]], "frobenius", 0.5, 0.01),
            *(4 * (128 + 8), 5 * 128),
        ),
        "weight_sums": (lambda: weight_sums(weight), 4096 + 4 * (32 + 64), 2 * 2048),
        "weighted_squares": (
            lambda: weighted_squares(tokens, token_weights.repeat(3, 1)),
            *(1280 + 120 + 3 * 64 * 4, 7 * 640),
        ),
    }


@pytest.mark.skipif(interpreting(), reason="most bodies are slow in the interpreter")
def test_every_operation_shows_its_name_bytes_and_flops(calls):
    found = recorded(lambda: [call() for call, *_ in calls.values()])
    assert {(name, *work) for name, (_, *work) in calls.items()} <= set(found)


def test_no_operation_is_left_out(calls):
    modules = [
        importlib.import_module(f"{kernels.__name__}.{path.stem}")
        for path in Path(kernels.__file__).parent.glob("*.py")
        if path.stem != "__init__"
    ]
    ops = {value.name for module in modules for value in vars(module).values() if isinstance(value, Op)}
    assert ops == calls.keys()


@pytest.mark.skipif(interpreting() or not HAS_TRITON, reason="launches are caught only where Triton compiles")
def test_the_first_launch_of_a_call_carries_its_bytes_and_flops(calls):
    from benchmarks.harness.jit_launches import caught_launches

    described: list[dict[str, object]] = []

    def describe(launch):
        kernel = SimpleNamespace(name=launch.kernel.__name__)
        arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        described.append(launch.kernel.launch_metadata(launch.grid, kernel, arguments))

    for name in calls.keys() - {
        "assignment",
        "expanded_linear",
        "gram_product",
        "pack_rows",
    }:  # torch operations on a GPU
        call, moved, flops = calls[name]
        described.clear()
        with caught_launches(describe):
            call()
        first, *later = described
        assert first["name"].startswith(f"ace_triton::{name} ")
        assert (first["bytes"], first["flops"]) == (moved, flops)
        assert all(launch.keys() == {"name"} for launch in later)


def test_a_launch_outside_of_an_operation_has_only_the_name_of_its_kernel():
    assert launch_metadata((1,), SimpleNamespace(name="_body"), {}) == {"name": "_body"}


def test_work_is_computed_only_for_a_profiler(device):
    counted = []

    def work(tensor: torch.Tensor) -> Work:
        counted.append(tensor)
        return Work(tensor.nbytes)

    double = Op("double", work, lambda tensor: 2 * tensor)
    ones = torch.ones(3, device=device)
    assert torch.equal(double.on(ones)(ones), 2 * ones)
    assert counted == []
    assert recorded(lambda: double.on(ones)(ones)) == [("double", 12, 0)]


@pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
def test_the_bytes_are_those_that_move(calls):
    """Within the partial sums of such small tensors, and what torch adds to the kernels' own traffic."""
    from benchmarks.harness.traffic_counter import Counter

    names = "adamw", "divergence", "pack_nm", "pack_scored", "round_groups", "select_nm", "token_norms", "unpack_nm"
    for name in names:
        call, moved, _ = calls[name]
        with Counter().counting() as traffic:
            call()
        assert moved <= traffic.read + traffic.written <= 1.1 * moved, name

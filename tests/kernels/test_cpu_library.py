"""The compiled CPU library: same results for all instruction sets and thread counts, and no access out of bounds."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from ace_triton.kernels import cpu, cpu_library, cpu_packed
from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.column_scale import ColumnScale
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.expanded_linear import expanded_linear, has_expanded_product
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_nm_reference, pack_scored
from ace_triton.kernels.pack_rows import pack_rows, unpack_rows
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.quantized_linear import quantized_linear
from ace_triton.kernels.rows_linear import rows_linear
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from ace_triton.kernels.select_rows import select_rows, select_rows_reference
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.unpack_nm import unpack_nm, unpack_nm_reference
from ace_triton.kernels.weight_sums import relative_importance
from ace_triton.kernels.weighted_squares import weighted_squares
from tests.kernels.every_operation import (
    DTYPES,
    PACKED_PATTERNS,
    assert_same,
    every_operation,
    full_terms,
    matrix,
)

needs_library = pytest.mark.skipif(
    not cpu_library.available(), reason=f"no CPU library: {cpu_library.why_unavailable()}"
)


pytestmark = pytest.mark.usefixtures("chosen_by_device")


def runs(isa: str) -> bool:
    try:
        cpu_library.use_isa(isa)
    except ValueError:
        return False
    return True


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """Every instruction set of this machine; the one in use is restored afterwards."""
    in_use = cpu_library.isa()
    yield [isa for isa in cpu_library.ISAS if runs(isa)]
    cpu_library.use_isa(in_use)


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (5, 8), (15, 16), (5, 32), (31, 32)])
def test_unpacking_agrees_and_stays_inside_where_metadata_are_damaged(isas, dtype, pattern):
    n, m = pattern
    packed = pack_nm_reference(torch.zeros(33, 160, dtype=dtype), n, m)
    packed.values.copy_(torch.arange(1, packed.values.numel() + 1).reshape(packed.values.shape))
    damaged = replace(packed, meta=torch.full_like(packed.meta, -1))
    expected = unpack_nm_reference(packed)
    for isa in isas:
        cpu_library.use_isa(isa)
        assert torch.equal(unpack_nm(packed), expected)
        assert bool((unpack_nm(damaged) != 0).any())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(32, 96), (7, 2052), (10, 1048), (64, 33), (130, 1), (1, 4)])
def test_every_instruction_set_agrees(isas, dtype, rows, cols):
    results = {}
    for isa in isas:
        cpu_library.use_isa(isa)
        results[isa] = every_operation(rows, cols, dtype)
    for isa in isas:
        assert_same(results[isa], results["portable"], isa)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_threads_agrees(dtype):
    before = torch.get_num_threads()
    try:
        results = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = every_operation(1600, 1536, dtype)
    finally:
        torch.set_num_threads(before)
    for threads, got in results.items():
        assert_same(got, results[1], f"{threads} threads")


@needs_library
def test_a_thread_is_used_only_if_it_saves_more_than_its_wake_takes():
    threads_for = cpu_library.library().ace_threads_for
    unit, mebibyte, many = 2**17, 2**20, 10**6
    assert [threads_for(count * unit, many, 64) for count in (0, 1, 3, 4, 8, 9, 16, 255, 256)] == [
        *(1, 1, 1, 2, 2, 3, 4, 15, 16)
    ]
    assert threads_for(256 * mebibyte, many, 4) == 4
    assert threads_for(256 * mebibyte, 3, 64) == 3
    assert threads_for(256 * mebibyte, 0, 64) == 1
    assert threads_for(2**62, many, 200) == 200


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scores_rank_as_the_reference_ranks_them(isas, dtype):
    weight = matrix(16, 64, dtype)
    weight[::2, ::3], weight[1::2, ::3] = torch.nan, torch.inf
    terms = ScoreTerms(scale=torch.arange(64).remainder(5).float())
    for isa in isas:
        cpu_library.use_isa(isa)
        for n, m in ((2, 4), (4, 8), (16, 32)):
            for axis in ("in", "out") if m <= 16 else ("in",):
                keep = select_nm_reference(weight, terms, n, m, axis=axis, output="mask")
                assert torch.equal(select_nm(weight, terms, n, m, axis=axis, output="mask"), keep)
        for scope, k in (("row", 30), ("layer", 500)):
            keep = select_rows_reference(weight, terms, k, scope=scope, output="mask")
            assert torch.equal(select_rows(weight, terms, k, scope=scope, output="mask"), keep)


@pytest.fixture
def before_a_guard_page() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Copies a tensor to the end of a mapping; any access behind it faults."""
    page = mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    guards = []

    def place(tensor: torch.Tensor) -> torch.Tensor:
        nbytes = tensor.numel() * tensor.element_size()
        pages = -(-nbytes // page) * page
        mapping = mmap.mmap(-1, pages + page)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        guard = whole.data_ptr() + pages
        assert protect(guard, page, 0) == 0
        guards.append((guard, whole))
        placed = whole[pages - nbytes : pages].view(tensor.dtype).reshape(tensor.shape)
        return placed.copy_(tensor)

    yield place
    for guard, _ in guards:
        protect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (8, 36), (5, 1028), (32, 7), (9, 1)])
def test_nothing_behind_a_tensor_is_touched(isas, before_a_guard_page, dtype, rows, cols):
    place = before_a_guard_page
    weight = place(matrix(rows, cols, dtype))
    full = full_terms(rows, cols)
    terms = ScoreTerms(place(full.row), place(full.col), place(full.scale), place(full.coupling))
    token_weights, gradient = place(torch.ones(2, rows)), place(torch.empty_like(weight))
    values, trained = place(matrix(rows, cols, torch.float32)), place(torch.empty_like(weight))
    kept = GradientMoments(place(torch.zeros(rows, cols)), place(torch.zeros(rows, cols)))
    for isa in isas:
        cpu_library.use_isa(isa)
        for output in ("mask", "bits", "weight"):
            if cols % 4 == 0:
                select_nm(weight, terms, 2, 4, output=output)
                select_nm(weight, ScoreTerms(scale=terms.scale), 1, 4, output=output)
            if rows % 4 == 0:
                select_nm(weight, terms, 2, 4, axis="out", output=output)
            for scope in ("row", "layer"):
                select_rows(weight, terms, cols // 2, scope=scope, output=output)
        moments(weight)
        relative_importance(weight, ColumnScale(base=terms.scale))
        token_norms(weight)
        divergence(weight, weight, into=gradient)
        adamw(values, kept, weight, Step(0.1, 1), rounded=trained)
        weighted_squares(weight, token_weights)
        assert all_finite(weight)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (5, 32), (9, 160)])
def test_nothing_behind_a_packed_weight_is_read(isas, before_a_guard_page, dtype, rows, cols):
    place = before_a_guard_page
    weight, tokens = matrix(rows, cols, dtype), matrix(5, cols, dtype, seed=1)
    for n, m in PACKED_PATTERNS:
        packed = pack_scored(weight, ScoreTerms(), n, m)
        guarded = replace(packed, values=place(packed.values), meta=place(packed.meta))
        damaged = replace(guarded, meta=place(torch.full_like(packed.meta, -1)))
        for isa in isas:
            cpu_library.use_isa(isa)
            assert torch.equal(nm_linear(tokens, guarded), nm_linear(tokens, packed))
            for count in (1, 5):
                nm_linear(tokens[:count], damaged)
    rows_packed = pack_rows(weight * (weight > 0))
    guarded_rows = replace(
        rows_packed, **{name: place(getattr(rows_packed, name)) for name in ("values", "meta", "starts")}
    )
    damaged_rows = replace(guarded_rows, meta=place(torch.full_like(rows_packed.meta, -1)))
    for isa in isas:
        cpu_library.use_isa(isa)
        assert torch.equal(rows_linear(tokens, guarded_rows), rows_linear(tokens, rows_packed))
        assert torch.equal(unpack_rows(guarded_rows), weight * (weight > 0))
        for count in (1, 5):
            rows_linear(tokens[:count], damaged_rows)
        unpack_rows(damaged_rows)


@pytest.fixture(params=cpu_library.INPUT_BITS)
def input_bits(request) -> Iterator[int]:
    cpu_library.use_input_bits(request.param)
    yield request.param
    cpu_library.use_input_bits(max(cpu_library.INPUT_BITS))


@needs_library
@pytest.mark.usefixtures("input_bits")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 96), (21, 416)])
def test_quantized_products_agree_and_read_nothing_behind_the_weight(
    isas, before_a_guard_page, bits, group, rows, cols
):
    place = before_a_guard_page
    weight, tokens = torch.randn(rows, cols), torch.randn(5, cols)
    tokens[1, ::9] *= 1e4
    tokens[2] = 0
    tokens[3, cols // 2], tokens[4, 0] = torch.inf, torch.nan
    pruned = [quantize_nm(pack_scored(weight, ScoreTerms(), n, m), bits, group) for n, m in ((2, 4), (3, 8), (17, 32))]
    for packed, product in (
        (quantize_dense(weight, bits, group), quantized_linear),
        *((one, nm_linear) for one in pruned),
    ):
        guarded = packed.with_tensors({name: place(tensor) for name, tensor in packed.tensors.items()})
        results = []
        for isa in isas:
            cpu_library.use_isa(isa)
            results.append(product(tokens, guarded))
            one_by_one = torch.cat([product(token[None], guarded) for token in tokens])
            torch.testing.assert_close(one_by_one, results[-1], rtol=0, atol=0, equal_nan=True)
        for got in results:
            torch.testing.assert_close(got, results[-1], rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 96), (70, 416), (3, 1056)])
def test_nothing_behind_an_expanded_weight_is_read(before_a_guard_page, tiles, bits, rows, cols):
    if not has_expanded_product() or (tiles and not cpu_packed.has_tiles()):
        pytest.skip("this processor does not multiply so")
    place = before_a_guard_page
    weight, tokens = matrix(rows, cols, torch.bfloat16), matrix(17, cols, torch.bfloat16, seed=1)
    tiles_in_use = cpu_packed.has_tiles()
    cpu_packed.use_tiles(tiles)
    try:
        for n, m in (None, None), (2, 4), (3, 8), (17, 32), (31, 32):
            pruned = None if n is None else pack_scored(weight, ScoreTerms(), n, m)
            packed = quantize_dense(weight, bits, 96) if pruned is None else quantize_nm(pruned, bits, 96)
            guarded = packed.with_tensors({name: place(tensor) for name, tensor in packed.tensors.items()})
            assert torch.equal(expanded_linear(tokens, guarded), expanded_linear(tokens, packed))
            if pruned is not None:
                expanded_linear(tokens, replace(guarded, meta=place(torch.full_like(pruned.meta, -1))))
    finally:
        cpu_packed.use_tiles(tiles_in_use)


@needs_library
@pytest.mark.parametrize(("rows", "cols"), [(8, 36), (32, 7), (5, 1028)])
def test_nothing_around_an_output_is_written(isas, monkeypatch, rows, cols):
    guard, poison = 256, 0xA5
    allocated = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((nbytes + 2 * guard,), poison, dtype=torch.uint8)
        allocated.append(whole)
        made = whole[guard : guard + nbytes].view(dtype).reshape(shape)
        return made, made.data_ptr()

    def check() -> None:
        assert allocated
        for whole in allocated:
            assert (whole[:guard] == poison).all()
            assert (whole[-guard:] == poison).all()
        allocated.clear()

    weight, terms = matrix(rows, cols, torch.bfloat16), full_terms(rows, cols)
    monkeypatch.setattr(cpu, "new", guarded)
    for isa in isas:
        cpu_library.use_isa(isa)
        for output in ("mask", "bits"):
            if cols % 4 == 0:
                cpu.select_nm(weight, terms, 2, 4, "in", output)
            if rows % 4 == 0:
                cpu.select_nm(weight, terms, 2, 4, "out", output)
            for scope in ("row", "layer"):
                cpu.select_rows(weight, terms, cols // 2, scope, output)
        cpu.moments(weight[None], None)
        cpu.weight_sums(weight, inverse=True, scale=ColumnScale(base=terms.scale))
        cpu.column_scale(ColumnScale(factor=terms.scale))
        cpu.variance_factor(weight.float(), "frobenius", 0.5, 0.01)
        cpu.token_norms(weight)
        cpu.divergence(weight, weight.clone(), guarded((rows, cols), weight.dtype)[0])
        cpu.weighted_squares(weight, torch.ones(2, rows))
        check()


@needs_library
def test_offsets_beyond_32_bits():
    stride, cols = 2**31 + 16, 64
    try:
        storage = torch.empty(stride + cols, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no room for a 4 GB mapping")
    weight = storage.as_strided((2, cols), (stride, 1))
    weight.copy_(matrix(2, cols, torch.bfloat16))
    expected = weight.contiguous()
    select_nm(expected, ScoreTerms(), 2, 4)
    select_nm(weight, ScoreTerms(), 2, 4)
    assert torch.equal(weight, expected)
    assert torch.equal(moments(weight).total, moments(expected).total)


@needs_library
def test_coupling_works_chunk_by_chunk():
    tokens, outputs = matrix(700, 24, torch.float32), matrix(700, 16, torch.float32, seed=1)
    together = coupling(tokens, outputs, torch.ones(700))
    parts = [coupling(tokens[t : t + 1], outputs[t : t + 1], torch.ones(1)) for t in range(700)]
    torch.testing.assert_close(together, torch.stack(parts).sum(0))

"""Budgets for the machine code of the kernels: what may not get worse without someone deciding it.

The figures are those of docs/kernels.md, from the arguments and blocks that the public launchers choose.
"""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.backend import interpreting
from benchmarks.harness.jit_launches import launches_on
from benchmarks.harness.kernel_cases import (
    DTYPES,
    TERMS,
    Case,
    adamw_case,
    cosp_select_case,
    coupling_case,
    divergence_case,
    few_bits_mma_case,
    join_gains_case,
    moments_case,
    nm_linear_case,
    nm_linear_mma_case,
    pack_case,
    pack_cutlass_case,
    round_groups_case,
    rows_linear_case,
    select_nm_case,
    select_rows_case,
    unpack_case,
    vector_cases,
    weight_sums_case,
)
from benchmarks.reports.machine_code import GPUS, compute_over_memory, gpu_target, kernel_of, per_element

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")

BOUND_BY_MEMORY = ("A100", "H100", "H200")


def check(case: Case, most_ratio: float, gpus: tuple[str, ...] = BOUND_BY_MEMORY, store_bits: int = 0) -> None:
    """No spills, 16-byte loads, and at most ``most_ratio`` of the memory's time on each GPU."""
    for target in sorted({GPUS[name].target for name in gpus}):
        launch, code = kernel_of(case, target)
        counts = per_element(case, launch, code)
        assert code.spills == 0, f"{case.name} spills on {target}"
        assert code.loads[128] > 0, f"{case.name} loads {dict(code.loads)} on {target}"
        assert not store_bits or set(code.stores) == {store_bits}, f"{case.name} stores {dict(code.stores)}"
        for name in (name for name in gpus if GPUS[name].target == target):
            ratio = compute_over_memory(case, counts, GPUS[name])
            assert ratio <= most_ratio, f"{case.name} takes {ratio:.2f} of the memory's time on {name}: {dict(counts)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", TERMS)
def test_2_4_is_bound_by_memory(dtype, metric):
    check(select_nm_case(dtype, metric), most_ratio=0.75, store_bits=128)


def test_row_starts_do_not_spill():
    case = rows_linear_case(torch.bfloat16, 4)
    launch, code = kernel_of(case, "sm_90")
    assert code.spills == 0
    assert per_element(case, launch, code).total() <= 65


def test_2_4_takes_twelve_instructions_a_weight():
    case = select_nm_case(torch.bfloat16, "scale")
    assert per_element(case, *kernel_of(case, "sm_90")).total() <= 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [moments_case, weight_sums_case])
def test_sums_are_bound_by_memory(dtype, make):
    check(make(dtype), most_ratio=0.95)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [moments_case, weight_sums_case])
def test_sums_write_and_read_again_two_percent_at_most(dtype, make):
    sums, _ = launches_on(gpu_target("sm_90"), make(dtype).call)
    matrix, *parts = (argument for argument in sums.arguments if torch.is_tensor(argument))
    assert 2 * sum(part.nbytes for part in parts) <= 0.02 * matrix.nbytes


@pytest.mark.parametrize("cols", [1536, 4096, 11008, 16384])
def test_rows_take_at_most_twice_the_memory_time(cols):
    check(select_rows_case(torch.bfloat16, cols), most_ratio=2.0, gpus=("H100",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_coupling_multiplies_on_tensor_cores_without_spills(dtype, target):
    _, code = kernel_of(coupling_case(dtype, "rms"), target)
    assert code.spills == 0
    assert code.loop["tensor"] > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_pruning_in_the_epilogue_leaves_the_products_as_they_are(target):
    _, stored = kernel_of(coupling_case(torch.bfloat16, "rms"), target)
    _, pruned = kernel_of(cosp_select_case(torch.bfloat16, "rms", "RIA"), target)
    assert pruned.spills == 0
    assert pruned.occupancy >= stored.occupancy
    assert pruned.loop["tensor"] == stored.loop["tensor"]
    assert pruned.loop.total() <= 1.05 * stored.loop.total()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize("case", list(vector_cases()), ids=lambda case: case.name)
def test_short_vectors_are_made_without_spills(case, target):
    _, code = kernel_of(case, target)
    assert code.spills == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_takes_little_more_than_the_memory_time(dtype):
    check(divergence_case(dtype), most_ratio=1.3, gpus=("A100", "H100"))
    for target in ("sm_100", "gfx942"):
        _, code = kernel_of(divergence_case(dtype), target)
        assert code.spills == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_waits_for_memory(dtype):
    check(adamw_case(dtype), most_ratio=0.4)
    for target in ("sm_100", "gfx942"):
        _, code = kernel_of(adamw_case(dtype), target)
        assert code.spills == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_groups_takes_little_more_than_the_memory_time(dtype):
    check(round_groups_case(dtype), most_ratio=1.35)
    for target in ("sm_100", "gfx942"):
        _, code = kernel_of(round_groups_case(dtype), target)
        assert code.spills == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_join_gains_holds_its_pairs_in_registers(target):
    _, code = kernel_of(join_gains_case(), target)
    assert code.spills == 0


@pytest.mark.parametrize(
    "case",
    [
        select_nm_case(torch.bfloat16, "RIA"),
        select_nm_case(torch.bfloat16, "scale", 8, 16),
        select_rows_case(torch.bfloat16, 4096),
        moments_case(torch.bfloat16),
        weight_sums_case(torch.bfloat16),
        coupling_case(torch.bfloat16, "abs"),
    ],
    ids=lambda case: case.name,
)
def test_nothing_spills_on_amd(case):
    _, code = kernel_of(case, "gfx942")
    assert code.spills == 0
    assert code.loads[128] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_bound_by_memory(dtype):
    """One row through a 2:4 weight, which is at most 0.57 of a dense one's bytes in two-byte dtypes."""
    case = nm_linear_case(dtype, 1)
    check(case, most_ratio=0.8)
    if dtype.itemsize == 2:
        assert case.moved / dtype.itemsize <= 0.57


def test_sparse_matrix_units_leave_two_instructions_a_weight():
    case = nm_linear_mma_case(torch.bfloat16, 1)
    check(case, most_ratio=0.4, gpus=("A100", "H100", "B200"))
    launch, code = kernel_of(case, "sm_90")
    assert per_element(case, launch, code).total() <= 2
    assert code.loop["tensor"] > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_expanding_few_bits_leaves_sparse_matrix_units_bound_by_memory(bits):
    """The integers of a row are loaded in one access of a lane for each span."""
    case = few_bits_mma_case(torch.bfloat16, bits, 1)
    for most_ratio, gpus in ((0.7, ("A100", "H100", "H200")), (1.0, ("B200",))):
        for gpu in (GPUS[name] for name in gpus):
            launch, code = kernel_of(case, gpu.target)
            counts = per_element(case, launch, code)
            assert code.spills == 0
            assert max(code.loads) == 16 * bits
            assert code.loop["tensor"] > 0
            assert counts.total() <= 2.1
            assert compute_over_memory(case, counts, gpu) <= most_ratio


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_few_bits_for_64_rows_do_not_spill_on_sparse_matrix_units(target):
    _, code = kernel_of(few_bits_mma_case(torch.bfloat16, 8, 64), target)
    assert code.spills == 0


@pytest.mark.parametrize("scored", [True, False])
def test_packing_takes_little_more_than_the_memory_time(scored):
    check(pack_case(torch.bfloat16, scored), most_ratio=1.6)
    check(pack_cutlass_case(torch.bfloat16, scored), most_ratio=1.6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_is_bound_by_memory(dtype):
    check(unpack_case(dtype), most_ratio=0.8, store_bits=128)


@pytest.mark.parametrize(("dtype", "n_tokens"), [(torch.bfloat16, 3), (torch.float16, 16), (torch.bfloat16, 32)])
def test_tiles_of_tokens_are_bound_by_memory(dtype, n_tokens):
    """On tensor cores, with nothing of the expanded weight in shared memory, which would show in the accesses."""
    case = nm_linear_case(dtype, n_tokens)
    check(case, most_ratio=0.95)
    for target in ("sm_80", "sm_90"):
        launch, code = kernel_of(case, target)
        weights = launch.keywords["BLOCK_ROWS"] * launch.keywords["WORDS"] * 32 / code.threads
        assert code.loop["tensor"] > 0
        assert code.loop["memory"] <= 0.6 * weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_before_ampere_few_tokens_share_a_read_without_spills(dtype):
    """Tiles of tokens spill there."""
    launch, code = kernel_of(nm_linear_case(dtype, 16), "sm_75")
    assert launch.kernel.__name__ == "_two_of_four_body"
    assert code.spills == 0


def test_any_pattern_runs_from_registers():
    """3:8 at one row: its gathers, and counts of bits, are bound by arithmetic."""
    _, code = kernel_of(nm_linear_case(torch.bfloat16, 1, 3, 8), "sm_90")
    assert code.spills == 0

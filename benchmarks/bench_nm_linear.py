"""nm_linear compared with torch and, on a CPU, with the same loop over the dense weight; packing, with a pass."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels import cpu, cpu_library
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import PackedNM, pack_nm, pack_scored
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.unpack_nm import unpack_nm
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.matrices import SAMPLED_ROWS, Matrix

TESTS = ("tests/kernels/test_nm_linear.py", "tests/kernels/test_pack_nm.py")


@pytest.fixture
def packed(matrix: Matrix) -> PackedNM:
    return pack_scored(matrix.dense, matrix.terms("wanda"), 2, 4)


def check_products(tokens: torch.Tensor, packed: PackedNM, weight: torch.Tensor) -> None:
    """Raise Disagreement if sampled outputs differ from the dense product by more than fp32 sums and rounding allow."""
    got = nm_linear(tokens, packed)[:, :SAMPLED_ROWS].double()
    expected = tokens.double() @ weight[:SAMPLED_ROWS].double().t()
    worst = float((got - expected).abs().max() / expected.abs().max())
    if worst > 4 * torch.finfo(tokens.dtype).eps + 1e-5:
        raise Disagreement(f"an output is off by {worst:.1e} of the largest")


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_few_rows(compare: Compare, matrix: Matrix, packed: PackedNM, rows: int) -> None:
    weight = unpack_nm(packed)
    tokens = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    others = [Provider("F.linear", lambda: torch.nn.functional.linear(tokens, weight))]
    if weight.device.type == "cpu" and cpu_library.available():
        others.append(Provider("the same loop, dense", lambda: cpu.dense_linear(tokens, weight)))
    compare(
        Comparison(
            f"nm_linear 2:4, {rows} row{'s' * (rows > 1)}",
            weight.shape,
            weight.dtype,
            lambda: nm_linear(tokens, packed),
            tuple(others),
            packed.packed_bytes,
            lambda: check_products(tokens, packed, weight),
        )
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_few_bits(compare: Compare, matrix: Matrix, bits: int, rows: int) -> None:
    packed = quantize_nm(pack_scored(matrix.dense, matrix.terms("wanda"), 8, 16), bits, 128)
    weight = unpack_nm(packed)
    tokens = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    compare(
        Comparison(
            f"nm_linear 8:16, {bits} bits, {rows} row{'s' * (rows > 1)}",
            weight.shape,
            weight.dtype,
            lambda: nm_linear(tokens, packed),
            (Provider("F.linear", lambda: torch.nn.functional.linear(tokens, weight)),),
            packed.packed_bytes,
            lambda: check_products(tokens, packed, weight),
        )
    )


@pytest.mark.parametrize("scored", [True, False])
def test_pack(compare: Compare, matrix: Matrix, packed: PackedNM, scored: bool) -> None:
    weight, pruned, terms = matrix.weight, unpack_nm(packed), matrix.terms("wanda")

    def pack() -> PackedNM:
        return pack_scored(weight, terms, 2, 4) if scored else pack_nm(pruned, 2, 4)

    def check() -> None:
        matrix.restore()
        if not torch.equal(unpack_nm(pack()), pruned):
            raise Disagreement("unpacking does not give back the weight that was packed")

    compare(
        Comparison(
            "pack_scored 2:4, wanda" if scored else "pack_nm 2:4",
            weight.shape,
            weight.dtype,
            pack,
            (Provider("mul_(1)", lambda: weight.mul_(1)),),
            weight.nbytes + packed.packed_bytes,
            check,
            matrix.restore,
        )
    )

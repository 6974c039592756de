"""nm_linear on sparse matrix units: the order of its metadata, and the operands of the instruction, lane by lane.

tests/ptx runs the compiled kernel. On a GPU these tests compare it with the dense product.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ace_triton.errors import AceError
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.few_bits import LARGEST
from ace_triton.kernels.nm_linear_mma import fragments_of, meta_of, nm_linear_mma, nm_linear_mma_reference
from ace_triton.kernels.pack_nm import PackedNM, pack_cutlass, pack_nm
from ace_triton.kernels.quantize_nm import dequantize_nm, quantize_nm, quantized_steps
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.unpack_nm import unpack_nm
from tests.ptx.few_bits_weight import few_bits_weight
from tests.ptx.mma_sp import mma_sp

HALVES = (torch.float16, torch.bfloat16)


def pruned(matrix: torch.Tensor) -> torch.Tensor:
    return select_nm(matrix, ScoreTerms(), 2, 4)


def integers(matrix: torch.Tensor) -> torch.Tensor:
    """Small integers, whose products and sums are exact in every order."""
    return (3 * matrix.float()).round().clamp(-8, 8).to(matrix.dtype)


@pytest.mark.parametrize("shape", [(16, 64), (1, 64), (37, 192), (64, 256)])
def test_repacked_metadata_turn_back(make_matrix, shape):
    packed = pack_nm(pruned(make_matrix(*shape, torch.bfloat16)), 2, 4)
    fragments = fragments_of(packed)
    assert tuple(fragments.shape) == (-(-shape[0] // 16), shape[1] // 64, 32)
    assert torch.equal(meta_of(fragments, shape), packed.meta)
    assert torch.equal(meta_of(fragments, (16 * len(fragments), shape[1]))[: shape[0]], packed.meta)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 128), (1, 128), (37, 384)])
def test_repacked_metadata_of_few_bits_turn_back(bits, shape):
    packed = few_bits_weight(shape, bits, 128, torch.bfloat16)
    fragments = fragments_of(packed)
    assert tuple(fragments.shape) == (-(-shape[0] // 16), shape[1] // 128, 64)
    assert torch.equal(meta_of(fragments, shape), packed.meta)


def test_padded_rows_have_valid_metadata(make_matrix):
    padded = fragments_of(pack_nm(pruned(make_matrix(3, 64, torch.bfloat16)), 2, 4))
    kept = meta_of(padded, (16, 64))[3:].cpu()
    assert torch.equal(kept, torch.full_like(kept, 0x33333333))


def test_metadata_are_those_of_cutlass(make_matrix):
    """CUTLASS's layout, which torch uses on GPUs, holds the operand of every lane for groups in their natural order."""
    weight = pruned(make_matrix(64, 256, torch.bfloat16))
    groups = weight.view(64, 4, 4, 2, 2, 4)  # [row, span, t, instruction, half of the tile's groups, place]
    ordered = groups.permute(0, 1, 3, 4, 2, 5).reshape(64, 256)
    words = pack_cutlass(ordered)[1].reshape(-1).view(torch.int32).view(8, 2, 8, 2, 2)
    # [32 inputs, 32 rows, g, 16 rows, half] as [32 rows, 16 rows, span, g, instruction, half]
    expected = words.view(4, 2, 2, 8, 2, 2).permute(2, 4, 0, 3, 1, 5).reshape(4, 4, 32)
    assert torch.equal(fragments_of(pack_nm(weight, 2, 4)), expected)


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor of 16 bits as words of 32."""
    return tensor.cpu().contiguous().view(torch.int32).numpy().view(np.uint32)


def output_of(sums: np.ndarray, token: int, row: int) -> float:
    """The output of a token of an instruction and a row of its tile, from the lane that holds it."""
    return float(sums[token % 2 + 2 * (row // 8), 4 * (row % 8) + token // 2])


def by_lanes(tokens: torch.Tensor, packed: PackedNM) -> torch.Tensor:
    """Outputs of 8 tokens: for each lane the words that the kernel gives it, and the instruction's model."""
    rows, cols = packed.shape
    values, inputs = words_of(packed.values), words_of(tokens)
    places = fragments_of(packed).cpu().numpy().view(np.uint32)
    outputs = torch.empty(8, rows)
    for tile in range(rows // 16):
        sums = np.zeros((4, 32), np.float32)
        for span in range(cols // 64):
            for s in range(2):
                a, b = np.empty((2, 4, 32), np.uint32)
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    for k in range(4):
                        a[k, lane] = values[16 * tile + g + 8 * (k % 2), 16 * span + 4 * t + 2 * s + k // 2]
                        group = 4 * (t // 2 + 2 * (k % 2)) + 2 * s + k // 2
                        b[k, lane] = inputs[g, 32 * span + 2 * group + t % 2]
                sums = mma_sp(a, b, sums, places[tile, span], s, packed.dtype)
        for token in range(8):
            for row in range(16):
                outputs[token, 16 * tile + row] = output_of(sums, token, row)
    return outputs


def few_bits_by_lanes(tokens: torch.Tensor, packed: PackedNM) -> torch.Tensor:
    """As :func:`by_lanes`, for integers of 8 or 4 bits: a sum and a scale for each span of 128 inputs."""
    rows, cols = packed.shape
    values, inputs = words_of(quantized_steps(packed).to(packed.dtype)), words_of(tokens)
    places = fragments_of(packed).numpy().view(np.uint32).reshape(rows // 16, cols // 128, 32, 2)
    outputs = torch.zeros(8, rows)
    for tile, span in np.ndindex(rows // 16, cols // 128):
        sums = np.zeros((4, 32), np.float32)
        for s in range(4):
            a, b = np.empty((2, 4, 32), np.uint32)
            for lane in range(32):
                g, t = divmod(lane, 4)
                for k in range(4):
                    a[k, lane] = values[16 * tile + g + 8 * (k % 2), 32 * span + 8 * t + 2 * s + k // 2]
                    group = 8 * (t // 2 + 2 * (k % 2)) + 2 * s + k // 2
                    b[k, lane] = inputs[g, 64 * span + 2 * group + t % 2]
            sums = mma_sp(a, b, sums, places[tile, span, :, s // 2], s % 2, packed.dtype)
        for token in range(8):
            for row in range(16):
                i = 16 * tile + row
                step = packed.absmax[i, span * 128 // packed.group].float() / LARGEST[packed.bits]
                outputs[token, i] += output_of(sums, token, row) * step
    return outputs


@pytest.mark.parametrize("dtype", HALVES)
def test_the_instruction_gives_the_product_from_what_each_lane_holds(make_matrix, dtype):
    weight, tokens = pruned(integers(make_matrix(32, 192, dtype))), integers(make_matrix(8, 192, dtype, seed=1))
    outputs = by_lanes(tokens, pack_nm(weight, 2, 4))
    assert torch.equal(outputs, (tokens.float() @ weight.float().t()).cpu())


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (4, torch.float16)])
def test_the_instruction_gives_the_product_of_few_bits_too(bits, dtype):
    packed = few_bits_weight((32, 256), bits, 128, dtype)
    tokens = torch.randint(-8, 9, (8, 256), generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = unpack_nm(dequantize_nm(packed, torch.float32))
    assert torch.equal(few_bits_by_lanes(tokens, packed), tokens.float() @ weight.t())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "n_tokens"), [((37, 384), 1), ((16, 128), 0), ((33, 1152), 9)])
def test_few_bits_equal_the_dense_product(make_matrix, dtype, bits, shape, n_tokens):
    tokens, bias = integers(make_matrix(n_tokens, shape[1], dtype, seed=1)), integers(make_matrix(1, shape[0], dtype))
    packed = few_bits_weight(shape, bits, 128, dtype).to(tokens.device)
    fragments = fragments_of(packed)
    weight = unpack_nm(dequantize_nm(packed, torch.float32))
    expected = tokens.double() @ weight.double().t() + bias.double()
    for outputs in (
        nm_linear_mma(tokens, packed, fragments, bias[0]),
        nm_linear_mma_reference(tokens, packed, fragments, bias[0]),
    ):
        assert outputs.dtype == dtype
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "n_tokens"), [((37, 192), 1), ((16, 64), 0), ((33, 1088), 9), ((40, 128), 64)])
def test_equals_the_dense_product(make_matrix, dtype, shape, n_tokens):
    packed = pack_nm(pruned(integers(make_matrix(*shape, dtype))), 2, 4)
    tokens, bias = integers(make_matrix(n_tokens, shape[1], dtype, seed=1)), integers(make_matrix(1, shape[0], dtype))
    fragments = fragments_of(packed)
    expected = tokens.double() @ unpack_nm(packed).double().t() + bias.double()
    for outputs in (
        nm_linear_mma(tokens, packed, fragments, bias[0]),
        nm_linear_mma_reference(tokens, packed, fragments, bias[0]),
    ):
        assert outputs.dtype == dtype
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-2, atol=0)


def test_any_shape_and_strides_of_tokens(make_matrix):
    packed = pack_nm(pruned(make_matrix(20, 128, torch.bfloat16)), 2, 4)
    wide, fragments = make_matrix(6, 129, torch.bfloat16), fragments_of(packed)
    tokens = wide[:, 1:].reshape(2, 3, 128)
    outputs = nm_linear_mma(tokens, packed, fragments)
    assert outputs.shape == (2, 3, 20)
    assert torch.equal(nm_linear_mma(wide[:, 1:], packed, fragments), outputs.view(6, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: pack_nm(select_nm(w, ScoreTerms(), 4, 8), 4, 8), r"mma.sp supports only 2:4, the weight is 4:8"),
        (lambda w: pack_nm(w[:, :96], 2, 4), r"needs a multiple of 64 inputs, the weight is \(16, 96\)"),
        (lambda w: pack_nm(w.float(), 2, 4), "float16 and bfloat16 only, the weight is torch.float32"),
        (
            lambda w: quantize_nm(pack_nm(w, 2, 4), 8, 64),
            "a scale per multiple of 128 inputs, the weight has one per 64",
        ),
        (
            lambda w: quantize_nm(pack_nm(w[:, :64], 2, 4), 4, 64),
            r"a multiple of 128 inputs for 4 bits, the weight is \(16, 64\)",
        ),
        (
            lambda w: quantize_nm(pack_nm(w.float(), 2, 4), 8, 128),
            "float16 and bfloat16 only, the weight is torch.float32",
        ),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(make_matrix, change, message):
    packed = change(pruned(make_matrix(16, 128, torch.bfloat16)))
    with pytest.raises(AceError, match=message):
        fragments_of(packed)
    tokens = make_matrix(1, packed.shape[1], packed.dtype)
    with pytest.raises(AceError, match=message):
        nm_linear_mma(tokens, packed, torch.zeros(1, 2, 32, dtype=torch.int32, device=tokens.device))


def test_other_arguments_that_do_not_fit_are_refused(make_matrix):
    packed = pack_nm(pruned(make_matrix(16, 128, torch.bfloat16)), 2, 4)
    fragments, tokens = fragments_of(packed), make_matrix(1, 128, torch.bfloat16)
    with pytest.raises(AceError, match=r"must be contiguous torch.int32 \(1, 2, 32\), got torch.int32 \(1, 1, 32\)"):
        nm_linear_mma(tokens, packed, fragments[:, :1].contiguous())
    with pytest.raises(AceError, match=r"must have the weight's dtype torch.bfloat16, got torch.float16"):
        nm_linear_mma(tokens.half(), packed, fragments)


@pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")
@pytest.mark.parametrize(("target", "kernel"), [("sm_80", "_mma_body"), ("sm_75", "_two_of_four_body")])
def test_gpus_without_sparse_units_run_nm_linear(target, kernel):
    from benchmarks.harness.jit_launches import launches_on
    from benchmarks.reports.machine_code import gpu_target

    packed = pack_nm(pruned(torch.randn(16, 64).bfloat16()), 2, 4)
    fragments, tokens = fragments_of(packed), torch.randn(1, 64).bfloat16()
    launched = launches_on(gpu_target(target), lambda: nm_linear_mma(tokens, packed, fragments))
    assert [launch.kernel.__name__ for launch in launched] == [kernel]

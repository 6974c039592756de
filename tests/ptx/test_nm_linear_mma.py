"""The kernel for sparse matrix units as PTX: what the compiled kernel gives each lane, through the instruction's model.

Triton promises no layout for tensors, so this is what shows that element k of the operands lies in thread k.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ace_triton.kernels import launch_packed
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.nm_linear_mma import bound_nm_linear_mma, fragments_of, nm_linear_mma
from ace_triton.kernels.pack_nm import pack_nm
from ace_triton.kernels.quantize_nm import dequantize_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.unpack_nm import unpack_nm
from tests.ptx.executor import executed_as_ptx
from tests.ptx.few_bits_weight import few_bits_weight

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "n_tokens", "tiles"),
    [
        ("sm_80", torch.bfloat16, (21, 256), 1, {}),  # all spans are inside
        ("sm_90", torch.float16, (37, 1088), 11, {"row_tiles": 2}),  # two trips, and spans past the last one
        ("sm_100", torch.bfloat16, (16, 128), 20, {"token_tiles": 2}),  # more tokens than a program takes
    ],
)
def test_equals_the_dense_product(monkeypatch, target, dtype, shape, n_tokens, tiles):
    plan = launch_packed.nm_linear_mma
    monkeypatch.setattr(launch_packed, "nm_linear_mma", lambda *size: replace(plan(*size), **tiles))
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-3, 4, size, generator=generator).to(dtype)

    weight = select_nm(integers(*shape), ScoreTerms(), 2, 4)
    packed, bias = pack_nm(weight, 2, 4), integers(shape[0])
    tokens = integers(n_tokens, shape[1] + 1)[:, 1:]
    fragments = fragments_of(packed)
    with executed_as_ptx(target) as ran:
        outputs = nm_linear_mma(tokens, packed, fragments, bias)
    assert ran == ["_mma_body"]
    assert torch.equal(outputs, (tokens.float() @ weight.float().t() + bias.float()).to(dtype))


@pytest.mark.parametrize(
    ("target", "bits", "dtype", "shape", "group", "n_tokens", "tiles"),
    [
        ("sm_80", 8, torch.bfloat16, (21, 256), 128, 1, {}),  # spans past the last one
        ("sm_90", 8, torch.float16, (37, 1152), 256, 11, {"row_tiles": 2}),  # two trips, and groups of two spans
        ("sm_100", 4, torch.bfloat16, (16, 512), 128, 20, {"token_tiles": 2, "spans": 2, "num_warps": 2}),  # all inside
        ("sm_120", 4, torch.float16, (33, 384), 1 << 20, 9, {}),  # a group a row
        ("sm_90", 4, torch.bfloat16, (16, 1280), 128, 1, {"row_tiles": 2, "spans": 4, "num_warps": 2}),
    ],
)
def test_few_bits_equal_the_dense_product(monkeypatch, target, bits, dtype, shape, group, n_tokens, tiles):
    plan = launch_packed.nm_linear_mma
    monkeypatch.setattr(launch_packed, "nm_linear_mma", lambda *size: replace(plan(*size), **tiles))
    generator = torch.Generator().manual_seed(1)
    packed = few_bits_weight(shape, bits, group, dtype)
    tokens = torch.randint(-3, 4, (n_tokens, shape[1]), generator=generator).to(dtype)
    bias = torch.randint(-3, 4, (shape[0],), generator=generator).to(dtype)
    weight = unpack_nm(dequantize_nm(packed, torch.float32))
    with executed_as_ptx(target) as ran:
        outputs = nm_linear_mma(tokens, packed, fragments_of(packed), bias)
    assert ran == ["few_bits_mma_body"]
    assert torch.equal(outputs, (tokens.float() @ weight.t() + bias.float()).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_repetition_of_a_bound_call_gives_the_same(bits):
    packed, generator = few_bits_weight((16, 256), bits, 128, torch.bfloat16), torch.Generator().manual_seed(2)
    fragments, bias = fragments_of(packed), torch.randn(16, generator=generator).bfloat16()
    tokens = torch.randn(2, 3, 256, generator=generator).bfloat16()
    with executed_as_ptx("sm_80") as ran:
        first, call = bound_nm_linear_mma(tokens[0], packed, fragments, bias)
        assert call is not None
        second = call(tokens[1], *packed.tensors.values(), fragments, bias)
        expected = [nm_linear_mma(some, packed, fragments, bias) for some in tokens]
    assert ran == ["few_bits_mma_body"] * 4
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_infinite_input_reaches_only_its_own_token(dtype):
    """Spans past the last one read it again; what they multiply is left out."""
    packed = few_bits_weight((16, 384), 4, 128, dtype)
    tokens = torch.ones(2, 384, dtype=dtype)
    tokens[0, 256:] = torch.inf
    with executed_as_ptx("sm_80"):
        outputs = nm_linear_mma(tokens, packed, fragments_of(packed))
    weight = unpack_nm(dequantize_nm(packed, torch.float32))
    assert torch.equal(outputs[1], (tokens[1].float() @ weight.t()).to(dtype))
    assert not outputs[0].isfinite().any()

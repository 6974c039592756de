"""unpack_nm against its reference, bit for bit; tests/kernels/test_pack_nm.py compares it with the packed weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.pack_nm import pack_scored_reference
from ace_triton.kernels.packed_nm import PackedNM
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import GROUP_SIZES
from ace_triton.kernels.unpack_nm import unpack_nm, unpack_nm_reference

INTEGERS = {torch.int8: torch.int8, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
PATTERNS = [(n, m) for m in GROUP_SIZES for n in sorted({1, m // 2, m - 1})]
MOST = 5 if interpreting() else 40


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


def random_packed(rows: int, groups: int, n: int, m: int, dtype: torch.dtype, device: str, seed: int = 0) -> PackedNM:
    """A packed weight with random bits as values (including any NaN, infinities and -0.0) at random positions."""
    generator = torch.Generator().manual_seed(seed)
    places = pack_scored_reference(torch.rand(rows, groups * m, generator=generator), ScoreTerms(), n, m)
    drawn = torch.randint(-(2**31), 2**31, (rows, groups * n), generator=generator)
    values = drawn.to(INTEGERS[dtype]).view(dtype)
    values[:, ::7] = -values.new_zeros(())
    return PackedNM(values, places.meta, n, m, places.shape).to(device)


@given(
    rows=st.integers(0, MOST),
    groups=st.integers(0, MOST),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(list(INTEGERS)),
    seed=st.integers(0, 1000),
)
def test_every_bit_comes_back(device, rows, groups, pattern, dtype, seed):
    packed = random_packed(rows, groups, *pattern, dtype, device, seed)
    weight = unpack_nm(packed)
    assert (weight.dtype, weight.device, weight.shape) == (dtype, packed.values.device, packed.shape)
    assert torch.equal(bits_of(weight), bits_of(unpack_nm_reference(packed)))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(3, 1056), (130, 64), (2, 4100)])
def test_layer_sized(device, dtype, shape):
    packed = random_packed(shape[0], shape[1] // 4, 2, 4, dtype, device)
    assert torch.equal(bits_of(unpack_nm(packed)), bits_of(unpack_nm_reference(packed)))


def test_a_part_of_the_outputs_into_memory_that_is_there(device):
    packed = random_packed(9, 24, 2, 4, torch.bfloat16, device)
    into = torch.full((9, 96), torch.nan, dtype=torch.bfloat16, device=device)
    assert unpack_nm(packed.outputs(2, 7), into[2:7]).data_ptr() == into[2].data_ptr()
    assert torch.equal(bits_of(into[2:7]), bits_of(unpack_nm_reference(packed)[2:7]))
    assert bool(into[:2].isnan().all())
    assert bool(into[7:].isnan().all())


@pytest.mark.parametrize("into", [torch.zeros(8, 8), torch.zeros(4, 8).half(), torch.zeros(4, 16)[:, ::2]])
def test_says_where_it_cannot_write(into):
    with pytest.raises(ValueError, match=r"contiguous torch.float32 \(4, 8\)"):
        unpack_nm(random_packed(4, 2, 2, 4, torch.float32, "cpu"), into)

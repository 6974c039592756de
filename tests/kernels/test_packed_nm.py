import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import NMLinear
from ace_triton.kernels.errors import PatternError
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import pack_cutlass, pack_nm
from ace_triton.kernels.packed_nm import PackedNM, group_counts, unpack_bits
from ace_triton.kernels.select_nm import GROUP_SIZES, pack_bits
from ace_triton.kernels.unpack_nm import unpack_nm


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8), m=st.sampled_from(GROUP_SIZES))
def test_bits_of_every_group_are_counted_in_its_place(words, m):
    meta = torch.tensor([words], dtype=torch.int64).to(torch.int32)
    counts = group_counts(meta, m)
    groups = unpack_bits(meta).reshape(-1, m).sum(1)
    fields = torch.stack([(counts.long() >> place) & (2**m - 1) for place in range(0, 32, m)], -1)
    assert torch.equal(fields.flatten(), groups)


@pytest.mark.parametrize("cols", [32, 96, 160, 64 + 16])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (5, 16), (8, 16)])
def test_sound_metadata_pass_and_any_flipped_bit_does_not(cols, n, m):
    keep = torch.rand(3, cols // m, m).argsort(-1).lt(n).reshape(3, cols)
    octets = torch.nn.functional.pad(pack_bits(keep), (0, -(cols // 8) % 4))
    meta = octets.view(torch.int32)
    packed = PackedNM(torch.ones(3, cols * n // m), meta, n, m, (3, cols))
    packed.check()
    for row, bit in ((0, 0), (1, cols - 1), (2, cols // 2)):
        word, place = divmod(bit, 32)
        meta[row, word] ^= torch.tensor(1 << place).to(torch.int32)
        with pytest.raises(PatternError, match=f"row {row}, group {bit // m} keep") as caught:
            packed.check()
        assert (caught.value.row, caught.value.group) == (row, bit // m)
        meta[row, word] ^= torch.tensor(1 << place).to(torch.int32)
    if cols % 32:
        meta[1, -1] ^= torch.tensor(1 << (cols % 32)).to(torch.int32)
        with pytest.raises(PatternError, match="row 1 marks inputs past"):
            packed.check()


def sound(rows: int = 8, cols: int = 64) -> PackedNM:
    return pack_nm(torch.zeros(rows, cols), 2, 4)


WRONG = {
    "too few values": ({"values": torch.zeros(8, 31)}, r"values of a 2:4 weight .* must be contiguous \(8, 32\)"),
    "values of another shape": ({"values": torch.zeros(4, 64)}, "values of a 2:4 weight"),
    "strided values": ({"values": torch.zeros(8, 64)[:, ::2]}, "values of a 2:4 weight"),
    "too little metadata": ({"meta": torch.zeros(8, 1, dtype=torch.int32)}, "meta of a 2:4 weight"),
    "metadata that were cast": ({"meta": torch.zeros(8, 2, dtype=torch.bfloat16)}, "bits, which a cast destroys"),
    "another shape": ({"shape": (16, 64)}, "values of a 2:4 weight"),
    "no such m": ({"m": 5}, "m must be one of"),
    "a negative m": ({"m": -4}, "m must be one of"),
    "m of 0": ({"m": 0}, "m must be one of"),
    "n of m": ({"n": 4}, "between 1 and 3"),
    "n of 0": ({"n": 0}, "between 1 and 3"),
    "inputs that m does not divide": ({"shape": (8, 62)}, "a multiple of 4"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_weight_made_by_hand_is_checked_before_it_is_used(wrong):
    changes, message = WRONG[wrong]
    packed = dataclasses.replace(sound(), **changes)
    into = torch.zeros(packed.shape)
    uses = [
        packed.check,
        lambda: unpack_nm(packed),
        lambda: unpack_nm(packed, into),
        lambda: nm_linear(torch.zeros(2, packed.shape[1]), packed),
        lambda: NMLinear(packed),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=r"CUTLASS supports only 2:4|of a 2:4 weight|a cast destroys|multiple of"):
        pack_cutlass(packed)

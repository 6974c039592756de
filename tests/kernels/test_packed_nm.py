import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.errors import PatternError
from ace_triton.kernels.packed_nm import PackedNM, group_counts, unpack_bits
from ace_triton.kernels.select_nm import GROUP_SIZES, pack_bits


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
